"""Our GGUF files in llama.cpp itself: log-probabilities, token ids, the words of a chat, where an answer ends.

llama.cpp is the one inside the wheel xllamacpp, asked over its own HTTP interface. It adds up in another order and works
out an angle from the one before it, so that log-probabilities differ by 1e-5 at first and by 1e-3 after 2000 tokens; with
f16, bf16 and q8_0 it also rounds what goes into a matrix product. docs/checkpoints.md has what was measured at length.
"""

import json
import random
import shutil
import unicodedata
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.checkpoint.formats_write import write_meta
from accessory.data import vocabulary
from accessory.data.chat_template import ChatTemplate
from accessory.data.dialog import Message
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights import TensorSource
from tests.helpers import assets, random_weights
from tests.unit.test_gguf_tokenizer import SENTENCEPIECE, STYLES, TEXTS, train
from tests.unit.test_gguf_write import KINDS, LLAMA3, make, write_tokenizer
from tools import expand_vocab, merge_tokenizer, meta_to_gguf

xllamacpp = pytest.importorskip("xllamacpp")

ASSETS = Path(__file__).resolve().parents[2].parent / "shared/assets"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALED = {  # so that the long prompts go well beyond what they were trained for
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": 3.0}},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}, "rope_theta": 5e5, "head_dim": 64},
    "yarn": {"rope_scaling": YARN | {"attention_factor": 1.25}},
    "qwen2 yarn": {"rope_scaling": YARN, "qkv_bias": True, "rope_theta": 1e6},
    "qwen3 yarn": {"rope_scaling": YARN, "qk_norm": True, "head_dim": 64, "rope_theta": 1e6},
}


class Client:
    """llama.cpp's server with one file: attention in fp32, nothing kept from one question to the next."""

    def __init__(self, file: Path, context: int = 512):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.warmup, params.verbosity, params.cache_prompt = False, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **question: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(question).encode())
        request.add_header("Content-Type", "application/json")
        with OPENER.open(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, specials: bool = False, bos: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=bos, parse_special=specials)["tokens"]

    def logprobs(self, ids: list[int], rows: int) -> torch.Tensor:
        """Of the token after `ids`, (rows,), as the model gives them.

        Token 0 is then drawn whatever they are: of an end, or of a part of a character, no numbers come back."""
        options = {"n_predict": 1, "n_probs": rows, "logit_bias": [[0, 1000.0]], "cache_prompt": False}
        answer = self.ask("/completion", prompt=ids, **options)
        found = {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
        assert sorted(found) == list(range(rows)) and answer["tokens_evaluated"] == len(ids)
        return torch.tensor([found[i] for i in range(rows)])

    def chat(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, int, int]:
        """Why the answer ended, tokens of the prompt, tokens of the answer."""
        answer = self.ask("/v1/chat/completions", messages=messages, temperature=0, cache_prompt=False, **options)
        return answer["choices"][0]["finish_reason"], *(
            answer["usage"][f"{k}_tokens"] for k in ("prompt", "completion")
        )


def write_model(directory: Path, args: ModelArgs, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Meta's files of a random model, beside what is in the directory."""
    directory.mkdir(exist_ok=True)
    write_meta(directory, TensorSource(weights or random_weights(args)), args.to_dict())
    return directory


def export(directory: Path, **options: Any) -> Path:
    file = directory.with_suffix(".gguf")
    meta_to_gguf.main(src=str(directory), dst=str(file), **options)
    return file


@torch.no_grad()
def difference(model: Path, file: Path, lengths: tuple[int, ...], rows: int = 280) -> float:
    """The largest of log-probabilities, after random texts of these lengths."""
    ours, theirs = Transformer.from_pretrained(model, dtype="fp32"), Client(file, max(lengths) + 64)
    tokens = torch.randint(0, 256, (max(lengths),), generator=torch.Generator().manual_seed(3))
    logits = ours(tokens[None])[0]
    assert logits.std() > 0.5
    return max(
        float((logits[n - 1].log_softmax(-1) - theirs.logprobs(tokens[:n].tolist(), rows)).abs().max()) for n in lengths
    )


@pytest.mark.parametrize("keys", (KINDS | SCALED).values(), ids=KINDS | SCALED)
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict) -> None:
    model = write_model(tmp_path / "m", make(max_position_embeddings=4096, **keys))
    write_tokenizer(model)
    file = export(model, dtype="f32")
    assert difference(model, file, (1, 2, 33)) <= 2e-5
    if "rope_scaling" in keys:
        assert difference(model, file, (700, 2100)) <= 2e-4


@pytest.mark.parametrize("dtype, bound", [("f16", 0.01), ("bf16", 0.08), ("q8_0", 0.2)])
@pytest.mark.parametrize("kind", ["llama mqa, odd widths", "qwen3"])
def test_rounded_weights(tmp_path: Path, kind: str, dtype: str, bound: float) -> None:
    write_tokenizer(write_model(tmp_path / "m", make(**KINDS[kind])))
    file = export(tmp_path / "m", dtype=dtype)
    assert difference(file, file, (1, 33, 100)) <= bound


def test_trained_weights(tmp_path: Path) -> None:
    """Greedy ids of stories260K as its makers give them, from a file of ours."""
    expected = json.loads(assets("stories260K/expected.json").read_text())
    meta_to_gguf.main(src=str(assets("stories260K/meta")), dst=str(tmp_path / "m.gguf"), dtype="f32")
    answer = Client(tmp_path / "m.gguf").ask(
        "/completion", prompt=[1], n_predict=200, temperature=0, return_tokens=True
    )
    assert answer["tokens"] == expected["greedy_from_bos_ids"][1:201]


def texts(count: int) -> Iterator[str]:
    """TEXTS, and random ones of words, spaces and characters of every plane."""
    yield from TEXTS
    draw = random.Random(0)
    ranges = [
        (0, 0x7F),
        (0x80, 0x2FF),
        (0x370, 0xDFF),
        (0x2000, 0x2BFF),
        (0x3000, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0x1F300, 0x1FAFF),
    ]
    parts = [
        " ",
        "  ",
        "\n",
        " \n",
        "\t",
        "\r\n",
        "'s",
        "12",
        "34567",
        "Hello",
        " world",
        "中国",
        "é",
        "don't",
        "...",
        "://",
    ]
    for _ in range(count):
        yield "".join(
            draw.choice(parts) if draw.random() < 0.6 else chr(draw.randint(*draw.choice(ranges)))
            for _ in range(draw.randint(1, 12))
        )


def one_layer(directory: Path, always: str | None = None) -> Client:
    """llama.cpp with the tokenizer in `directory` around a tiny model; one that has a single answer if told so."""
    tokenizer = Tokenizer.open(directory)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 1, "hidden_dim": 32, "vocab_size": tokenizer.vocab_size + 3}
    args = ModelArgs.from_dict(sizes | {"max_position_embeddings": 512, "tie_word_embeddings": not always})
    weights = random_weights(args)
    if always:
        weights = {n: t * ("norm" in n) for n, t in weights.items()}
        weights["tok_embeddings.weight"][:, 0] = weights["output.weight"][tokenizer.special_tokens[always], 0] = 1.0
    return Client(export(write_model(directory, args, weights), dtype="f16"))


def agree(ours: Tokenizer, theirs: Client, count: int = 100) -> None:
    """Ids of text without and with special tokens in it. llama.cpp's qwen2 does not normalise: its texts are NFC here."""
    names = sorted(ours.special_tokens)
    for i, text in enumerate(texts(count)):
        text = unicodedata.normalize("NFC", text)
        assert theirs.ids(text) == ours.encode(text), text
        name = names[i % len(names)]
        for mixed in (f"{text}{name}{text}", f"[PAD{ours.vocab_size + 1}] {name}", f" {name} {text}"):
            assert theirs.ids(mixed, specials=True) == ours.encode_with_specials(mixed, "legacy"), mixed
    bos = [ours.bos_id] if ours.add_bos else []
    assert theirs.ids("Hello", bos=True) == bos + ours.encode("Hello")


@pytest.mark.parametrize("style", STYLES)
def test_ids_of_byte_level_bpe(tmp_path: Path, style: str) -> None:
    agree(Tokenizer.open(train(tmp_path / "m", *STYLES[style])), one_layer(tmp_path / "m"))


@pytest.mark.parametrize("name", [*SENTENCEPIECE[:3], "smollm2-135m/tokenizer.json"])
def test_ids_of_real_tokenizers(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    file = shutil.copy(
        assets(name), tmp_path / "m" / ("tokenizer.json" if name.endswith("json") else "tokenizer.model")
    )
    agree(Tokenizer.open(file), one_layer(tmp_path / "m"))


def sentencepiece_of(directory: Path, lines: list[str], size: int) -> Path:
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(vocabulary.train(lines, size, "bpe"))
    return directory / "tokenizer.model"


def test_an_expanded_vocabulary(tmp_path: Path) -> None:
    """Pieces of a second model and special tokens, in the tokenizer and in the weights.

    The base's "▁▁" has score -0.0, the appended "▁中国" 0.0: two that overlap in " 中国"."""
    old = sentencepiece_of(tmp_path / "old", Path(__file__).read_text().splitlines(), 500)
    extra = sentencepiece_of(tmp_path / "extra", ["中国人民 世界 你好世界 中国", "人民 公园 今天天气"] * 9, 300)
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": ["<|im_start|>", "<|im_end|>", "<call>"]}))
    options = {"extra": str(extra), "special_tokens": str(tmp_path / "tokens.json"), "dst": str(tmp_path / "new")}
    merge_tokenizer.main(base=str(old), **options)
    write_model(tmp_path / "old", make(vocab_size=500))
    expand_vocab.main(src=str(tmp_path / "old"), dst=str(tmp_path / "grown"), tokenizer_path=str(tmp_path / "new"))
    tokenizer, file = Tokenizer.open(tmp_path / "grown"), export(tmp_path / "grown", dtype="f32")
    assert tokenizer.vocab_size > 510
    assert difference(tmp_path / "grown", file, (1, 33), tokenizer.vocab_size) <= 2e-5
    agree(tokenizer, Client(file))


CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}{% if loop.index0 == 0 "
    "and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DIALOGS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", " What is 2+2? \n")],
    [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "你好 🙂\n\n 3+3")],
]


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_a_chat(tmp_path: Path, template: str) -> None:
    """The same words, one BOS in front, and an end at EOS and at <|im_end|> but at no other special token."""
    sentencepiece_of(tmp_path / "plain", Path(__file__).read_text().splitlines(), 400)
    tokenizer = Tokenizer.open(tmp_path / "plain").with_special_tokens(["<|im_start|>", "<|im_end|>"])
    for directory, always in (("a", "</s>"), ("b", "<|im_end|>"), ("c", "<|im_start|>")):
        tokenizer.save(tmp_path / directory)
        (tmp_path / directory / "chat_template.jinja").write_text(template)
        theirs = one_layer(tmp_path / directory, always)
        for dialog in DIALOGS:
            words = ChatTemplate(template, tokenizer, "t").render([Message(*m) for m in dialog], prompt=True)
            messages = [{"role": role, "content": text} for role, text in dialog]
            assert theirs.ask("/apply-template", messages=messages)["prompt"] == words.removeprefix("<s>")
            ids = [tokenizer.bos_id, *tokenizer.encode_with_specials(words.removeprefix("<s>"))]
            ended = ("length", len(ids), 5) if always == "<|im_start|>" else ("stop", len(ids), 1)
            assert theirs.chat(messages, max_tokens=5) == ended


def test_a_template_with_a_bos_that_the_tokenizer_has_not(tmp_path: Path) -> None:
    train(tmp_path / "m", *STYLES["gpt-2"])
    (tmp_path / "m/chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    theirs = one_layer(tmp_path / "m")
    assert theirs.ask("/apply-template", messages=[{"role": "user", "content": "Hi"}])["prompt"] == "Hi<|im_end|>"
