"""Qwen's kind of tokenizer: byte-level BPE over NFC text with a split of its own, no BOS, and an EOS that its neighbours name.

`write_qwen_tokenizer(directory)` makes a small one with the published structure; tests/dist/test_families.py trains with it.
"""

import json
from pathlib import Path

import pytest

from accessory.checkpoint.formats_write import special_ids
from accessory.tokenizer import Tokenizer
from tests.unit.test_sft import encode_example, prompt

tokenizers = pytest.importorskip("tokenizers")

SPLIT = (  # as in transformers, models/qwen2/tokenization_qwen2.py: a digit is a token, unlike in Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")  # Qwen3's: added tokens that are not special
TEXTS = [
    "",
    "What colour is the grass? It is green green.",
    "I'll say 12345, she'D 'Re-do\tit\r\n\n  so",
    "你好，世界 🙂 e\u0301 = é, ﬁ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<think>\nhm\n</think> yes",
    prompt("Tell me the colour of snow."),
]


def write_qwen_tokenizer(directory: Path, chat: bool = True) -> Path:
    """tokenizer.json, tokenizer_config.json and generation_config.json with 280 + 5 tokens, as Qwen's repositories hold them.

    `chat`: an answer ends with <|im_end|>, as in the Instruct models; else with <|endoftext|>."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS, trainer)
    model.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    model.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    ids = {token: model.token_to_id(token) for token in SPECIAL}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>" if chat else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]] if chat else ids["<|endoftext|>"]
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": stops,
        "do_sample": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory / "tokenizer.json"


def test_ids_are_those_of_tokenizers_and_no_bos_is_put(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_qwen_tokenizer(tmp_path))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.add_bos) == ("hf", 285, False)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=tokenizer.add_bos) == theirs.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.normalizer.normalize_str(text)
    digits = tokenizer.encode("12345")
    assert len(digits) == 5 and tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.open(write_qwen_tokenizer(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "<|" not in text:  # a special token in a text is text to us
            assert tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert tokenizer.eos_id == theirs.eos_token_id and tokenizer.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("chat", [True, False])
def test_what_ends_an_answer(tmp_path: Path, chat: bool) -> None:
    tokenizer = Tokenizer.open(write_qwen_tokenizer(tmp_path, chat))
    text_end, _, message_end = (280 + i for i in range(3))
    assert tokenizer.eos_ids == ((message_end, text_end) if chat else (text_end, message_end))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (tokenizer.eos_ids[0], text_end)
    ids, length = encode_example(tokenizer, prompt("Which colour has coal?"), "It is black.")
    assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids[length:], after=ids[:length]) == "It is black."
    assert ids[:length] == tokenizer.encode(prompt("Which colour has coal?"))
    assert special_ids(tokenizer)["eos_token_id"] == list(tokenizer.eos_ids)


def test_without_its_neighbours_there_is_no_bos_to_put(tmp_path: Path) -> None:
    """tokenizer.json alone: ChatML's pair is known, and still nothing is put in front of a text."""
    path = write_qwen_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    tokenizer = Tokenizer.open(path)
    assert tokenizer.eos_id == 282 and not tokenizer.add_bos
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 280, False)
    with pytest.raises(ValueError, match="BOS"):
        tokenizer.encode("a", bos=True)


def test_a_saved_copy_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_qwen_tokenizer(tmp_path / "there"))
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    again = Tokenizer.open(tmp_path / "copy")
    assert (again.fingerprint, again.eos_ids, again.bos_id, again.pad_id, again.add_bos) == (
        *(tokenizer.fingerprint, tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id),
        False,
    )
