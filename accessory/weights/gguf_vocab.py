"""A tokenizer's file -> GGUF's keys of it, with the choices of llama.cpp's convert_hf_to_gguf.py.

    sentencepiece   "llama"   tokens, scores and types as in the model; what was added beside it is control
    tokenizer.json  "gpt2"    byte-level BPE; `pre` is told by the structure of its pre-tokeniser
    tiktoken        "gpt2"    Llama 3's: every way to cut a token in two is a merge, in the order of the ranks

Rows of the embedding beyond the tokenizer become "[PAD7]", unused. The way back: gguf_tokenizer.py.
Test: tests/unit/test_gguf_tokenizer.py
"""

import json
import re
from typing import Any

from accessory import sentencepiece_proto
from accessory.sentencepiece_proto import BPE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from accessory.weights.gguf_tokenizer import ALIASES, NORMALIZERS, PRE_TOKENIZERS, WHOLE_WORDS

# Added tokens that are control tokens whatever the file calls them.
SPECIAL_LOOK = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<unused.*>", re.DOTALL)
UNNAMED_EOS = {"gpt2": 11, "llama": 2}  # what llama.cpp takes for EOS where a file names none
ENDS_A_TURN = {"eot_token_id": ("<|eot_id|>", "<|im_end|>"), "eom_token_id": ("<|eom_id|>",)}
BELOW_ZERO = -(2.0**-100)
Token = tuple[str, int, float]  # text, type, score (of sentencepiece)


def vocabulary(tokenizer: Any, raw: bytes, beside: dict[str, Any], rows: int) -> dict[str, Any]:
    """The keys after "tokenizer." of an opened `accessory.tokenizer.Tokenizer`, for an embedding of `rows`.

    `raw`: its file's content. `beside`: tokenizer_config.json's, or {}. Raises ValueError naming the file for a tokenizer
    that GGUF has no kind for, or one with more tokens than the embedding has rows."""
    read = {"sentencepiece": _sentencepiece, "hf": _byte_level, "tiktoken": _tiktoken}[tokenizer.kind]
    try:
        tokens, keys = read(tokenizer, raw)
    except ValueError as error:
        raise ValueError(f"{tokenizer.path}: {error}") from error
    if (last := max(tokens)) >= rows:
        raise ValueError(
            f"{tokenizer.path} has {last + 1} tokens, but the embedding {rows} rows: "
            "give the model's own tokenizer with --tokenizer_path"
        )
    # What was added is special, unless a tokenizer_config.json says of a token after the file's own that it is not.
    tokens |= {i: _added(text, True) for text, i in tokenizer.added_tokens.items() if i < rows}
    tokens |= {i: token for i, token in _added_beside(beside).items() if last < i < rows}
    listed = [tokens.get(i, (f"[PAD{i}]", UNUSED, -10000.0)) for i in range(rows)]
    keys |= {"tokens": [text for text, _, _ in listed], "token_type": [kind for _, kind, _ in listed]}
    if keys["model"] == "llama":
        keys["scores"] = [score for _, _, score in listed]
    keys |= _special_ids(tokenizer, beside, keys["tokens"])
    template = beside.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if template and "bos_token" in template and "bos_token_id" not in keys:
        template = "{% set bos_token = '' %}" + template  # llama.cpp would put its token 1 or 11 there, an ordinary one
    return {f"ggml.{k}": v for k, v in keys.items()} | ({"chat_template": template} if template else {})


def notes(vocabulary: dict[str, Any], trained_in: str | None = None) -> list[str]:
    """Lines on what llama.cpp does otherwise with these keys. `trained_in`: the name of a template, which GGUF cannot say.

    Raises ValueError as `differences` does."""
    lines = [f"llama.cpp gives other token ids for {what}" for what in differences(vocabulary)]
    asked_in = "the chat template beside the tokenizer" if "chat_template" in vocabulary else "ChatML"
    remedy = "put a chat_template.jinja beside the tokenizer, or send whole prompts"
    if trained_in:
        lines.append(
            f"trained in the template {trained_in}; llama.cpp's chat asks in {asked_in}: if they differ, {remedy}"
        )
    elif "chat_template" not in vocabulary:
        lines.append(f"no chat template: llama.cpp's chat asks in {asked_in}: {remedy}")
    return lines


def differences(vocabulary: dict[str, Any]) -> list[str]:
    """The texts that llama.cpp cuts otherwise than the tokenizer these keys were made of.

    Raises ValueError for what llama.cpp would end with: itself, or every answer at an ordinary token."""
    get = lambda key, default=None: vocabulary.get(f"ggml.{key}", default)  # noqa: E731
    kind, tokens, types = get("model"), get("tokens"), get("token_type") or ()
    if get("eos_token_id") is None and (eos := UNNAMED_EOS.get(kind, len(tokens))) < len(tokens):
        raise ValueError(
            f"the tokenizer names no EOS, and llama.cpp would end every answer at token {eos}, {tokens[eos]!r}: name one "
            "as eos_token in a tokenizer_config.json beside the tokenizer"
        )
    lines = []
    if kind == "gpt2" and ALIASES.get(get("pre"), get("pre")) in NORMALIZERS:
        lines.append("text that is not NFC (e and an accent as two characters)")
    if kind != "llama":
        return lines
    listed = set(tokens)
    if any(f"<0x{b:02X}>" not in listed and not (b < 128 and chr(b) in listed) for b in range(256)):
        raise ValueError(
            "the sentencepiece model has no tokens for single bytes, and llama.cpp ends at the first character that is "
            "none of its pieces: train it with --byte_fallback true, or export to Hugging Face instead"
        )
    if get("precompiled_charsmap"):
        lines.append("characters that the sentencepiece model replaces (full width, ligatures)")
    if get("remove_extra_whitespaces"):
        lines.append("repeated spaces, and those at the ends, which the sentencepiece model takes away")
    if USER_DEFINED in types and get("add_space_prefix", True):
        lines.append("what follows a user-defined piece, where llama.cpp puts a space")
    return lines


def _added_beside(beside: dict[str, Any]) -> dict[int, Token]:
    """The added tokens that a tokenizer_config.json lists."""
    listed = beside.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    return {int(i): _added(entry["content"], entry.get("special")) for i, entry in entries}


def _added(text: str, special: Any) -> Token:
    kind = CONTROL if special or SPECIAL_LOOK.fullmatch(text) else USER_DEFINED
    return (text if kind == CONTROL else text.replace("▁", " ")), kind, -1000.0


def _special_ids(tokenizer: Any, beside: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """bos, eos, unk, pad and what else ends a turn: by the names beside the tokenizer, else as it says itself."""
    ids = {text: i for i, text in enumerate(tokens)}

    def find(name: str, default: int | None) -> int | None:
        said = beside.get(f"{name}_token")
        said = said.get("content") if isinstance(said, dict) else said
        return ids.get(said, default)

    eos = find("eos", tokenizer.eos_id)
    found = {"bos_token_id": find("bos", tokenizer.bos_id), "eos_token_id": eos, "unknown_token_id": find("unk", None)}
    found["padding_token_id"] = find("pad", tokenizer.pad_id)
    for key, names in ENDS_A_TURN.items():
        found[key] = next((i for i in tokenizer.eos_ids if i != eos and tokens[i] in names), None)
    adds = {"add_bos_token": bool(tokenizer.add_bos), "add_eos_token": bool(beside.get("add_eos_token"))}
    return {key: i for key, i in found.items() if i is not None} | adds


def _sentencepiece(tokenizer: Any, raw: bytes) -> tuple[dict[int, Token], dict[str, Any]]:
    model = sentencepiece_proto.read(raw)
    if model.model_type != BPE or model.whitespace_as_suffix or not model.escape_whitespaces:
        raise ValueError(
            "is a sentencepiece model of another kind than BPE with the space before a word, which GGUF's llama kind "
            "cannot hold: export to Hugging Face instead"
        )
    texts = [t.replace("▁", " ") if k == USER_DEFINED else t for t, k in zip(model.pieces, model.types)]
    keys = {"model": "llama", "pre": "default", "add_space_prefix": model.add_space_prefix}
    keys["remove_extra_whitespaces"] = model.remove_extra_whitespaces
    if model.charsmap:
        keys["precompiled_charsmap"] = model.charsmap
    if model.ids["unk"] >= 0:
        keys["unknown_token_id"] = model.ids["unk"]
    return dict(enumerate(zip(texts, model.types, _told_apart(model)))), keys


def _told_apart(model: sentencepiece_proto.SentencePieceModel) -> list[float]:
    """The scores; -0.0 a little below 0.0 where pieces have the one and others the other.

    The best piece of a trained model has -0.0, those that were appended to it 0.0. To sentencepiece (0.2.3) that is less,
    to llama.cpp the same, and of the same it takes the one further left."""
    pieces = [(score, kind == NORMAL and str(score)) for score, kind in zip(model.scores, model.types)]
    both = {"0.0", "-0.0"} <= {said for _, said in pieces}
    return [BELOW_ZERO if both and said == "-0.0" else score for score, said in pieces]


def _byte_level(tokenizer: Any, raw: bytes) -> tuple[dict[int, Token], dict[str, Any]]:
    content = json.loads(raw.decode("utf-8-sig"))
    pre, model = pre_tokenizer_name(content), content["model"]
    tokens = {i: (text, NORMAL, 0.0) for text, i in model["vocab"].items()}
    tokens |= {t["id"]: _added(t["content"], t.get("special")) for t in content.get("added_tokens") or ()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, {"model": "gpt2", "pre": pre, "merges": merges}


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """tokenizer.ggml.pre of a tokenizer.json's content. Raises ValueError naming what has no name in GGUF."""
    model, normalizer = content.get("model") or {}, content.get("normalizer")
    if is_sentencepiece(content):
        raise ValueError("is a sentencepiece tokenizer in another form: give its tokenizer.model with --tokenizer_path")
    if model.get("type") != "BPE" or any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError(f"is of type {model.get('type')}: only byte-level BPE can be exported to GGUF")
    steps = _essence(content.get("pre_tokenizer"))
    name = next((name for name, known in PRE_TOKENIZERS.items() if _essence(known) == steps), None)
    if name is None:
        raise ValueError(
            f"its pre_tokenizer {json.dumps(steps)[:200]} is none that GGUF has a name for here: "
            f"{', '.join(PRE_TOKENIZERS)} are known"
        )
    if normalizer not in (None, NORMALIZERS.get(name)):
        raise ValueError(f"its normalizer {json.dumps(normalizer)[:100]} has no name in GGUF")
    if model.get("ignore_merges") and name not in WHOLE_WORDS:
        raise ValueError(f"ignore_merges is set, which llama.cpp does not do for its pre-tokeniser {name}")
    return name


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's content is a sentencepiece model that was rewritten (Llama 2, Mistral)."""
    return bool((content.get("model") or {}).get("byte_fallback"))


def _essence(step: Any) -> Any:
    """A pre_tokenizer without what makes no difference to the ids."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        steps = [_essence(s) for s in step.get("pretokenizers") or ()]
        return steps[0] if len(steps) == 1 else steps
    defaults = {"ByteLevel": {"use_regex": True}, "Split": {"invert": False}}.get(step.get("type"), {})
    return {k: v for k, v in (defaults | step).items() if k != "trim_offsets"}


def _tiktoken(tokenizer: Any, raw: bytes) -> tuple[dict[int, Token], dict[str, Any]]:
    """The merges as transformers' TikTokenConverter finds them; the 256 special tokens have no line in the file."""
    ranks, letters = tokenizer.ranks, byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks)
        merges += [f"{spelled[a]} {spelled[b]}" for _, _, a, b in pairs]
    tokens = {rank: (spelled[token], NORMAL, 0.0) for token, rank in ranks.items()}
    tokens |= {i: (name, CONTROL, 0.0) for name, i in tokenizer.special_tokens.items()}
    return tokens, {"model": "gpt2", "pre": "llama-bpe", "merges": merges}


def byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]
