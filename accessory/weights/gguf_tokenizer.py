"""GGUF's keys of a tokenizer -> the files that `accessory.tokenizer` and Hugging Face open.

    tokenizer.ggml.model "gpt2"    tokenizer.json    byte-level BPE; its pre-tokeniser by name, PRE_TOKENIZERS
    tokenizer.ggml.model "llama"   tokenizer.model   sentencepiece, of its BPE kind
    either                         tokenizer_config.json   bos, eos, unk, pad, whether bos is added, chat template

gguf_vocab.py is the way back. What GGUF does not keep: whether an added token takes the spaces beside it. "[PAD7]", the
unused tokens that llama.cpp's converter makes of embedding rows beyond the tokenizer, are left out again.
Formats: github.com/ggml-org/ggml docs/gguf.md, tokenizers' tokenizer.json. Test: tests/unit/test_gguf_tokenizer.py
"""

import json
from collections import Counter
from typing import Any

from accessory import sentencepiece_proto
from accessory.sentencepiece_proto import CONTROL, UNUSED, USER_DEFINED, SentencePieceModel

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(regex: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _sequence(step, BYTES | {"use_regex": False})


PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> tokenizer.json's pre_tokenizer
    "gpt-2": BYTES,
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, BYTES),
    "llama-bpe": _split(LLAMA3_SPLIT),
    "qwen2": _split(QWEN2_SPLIT),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2"}
NORMALIZERS = {"qwen2": {"type": "NFC"}}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is never merged from its parts
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
REMEDY = "give the model's own tokenizer with --tokenizer_path"


def tokenizer_files(metadata: dict[str, Any], where: object) -> dict[str, bytes]:
    """File name -> content of the tokenizer inside the GGUF. Raises ValueError naming `where` for a kind that cannot be
    rebuilt, or keys that do not fit each other."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{where}: a tokenizer of kind {kind!r} cannot be rebuilt: {REMEDY}")
    _check(metadata, where)
    if kind == "gpt2":
        name, content = "tokenizer.json", byte_level_bpe(metadata, where).encode()
    else:
        name, content = "tokenizer.model", sentencepiece_model(metadata)
    config = json.dumps(tokenizer_config(metadata), indent=2, ensure_ascii=False)
    return {name: content, "tokenizer_config.json": config.encode()}


def _check(metadata: dict[str, Any], where: object) -> None:
    """Raises ValueError for lists of wrong types or lengths, tokens that come twice, ids that are none of them."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens is no list of strings: {REMEDY}")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{where}: tokenizer.ggml.tokens has {Counter(tokens).most_common(1)[0][0]!r} twice: {REMEDY}")
    lists = {"token_type": int, **({"scores": float} if metadata["tokenizer.ggml.model"] == "llama" else {})}
    for key, kind in lists.items():
        values = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or len(values) != len(tokens) or not all(type(v) is kind for v in values):
            raise ValueError(f"{where}: tokenizer.ggml.{key} is not one {kind.__name__} per token: {REMEDY}")
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap", [])
    if not isinstance(charsmap, list) or not all(type(v) is int and 0 <= v < 256 for v in charsmap):
        raise ValueError(f"{where}: tokenizer.ggml.precompiled_charsmap is no list of bytes: {REMEDY}")
    for key in IDS.values():
        token = metadata.get(f"tokenizer.ggml.{key}")
        if token is not None and not (type(token) is int and 0 <= token < len(tokens)):
            raise ValueError(f"{where}: tokenizer.ggml.{key} {token!r} is none of its {len(tokens)} tokens: {REMEDY}")


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as Hugging Face and `accessory.tokenizer` read it."""
    get, tokens = (lambda key: metadata.get(f"tokenizer.ggml.{key}")), metadata["tokenizer.ggml.tokens"]
    spm = get("model") == "llama"
    config = {"tokenizer_class": "LlamaTokenizer" if spm else "PreTrainedTokenizerFast"}
    bos_by_default = spm or ALIASES.get(str(get("pre")), get("pre")) == "llama-bpe"
    config["add_bos_token"] = bos_by_default if get("add_bos_token") is None else bool(get("add_bos_token"))
    config["add_eos_token"] = bool(get("add_eos_token"))
    config |= {f"{short}_token": tokens[get(key)] for short, key in IDS.items() if get(key) is not None}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return config | ({"model_max_length": context} if context else {})


def byte_level_bpe(metadata: dict[str, Any], where: object) -> str:
    """tokenizer.json of a gpt2-kind tokenizer, from tokens, merges and the name of its pre-tokeniser.

    Added tokens at the end stay out of the BPE's vocabulary, as in the published files."""
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    pre = ALIASES.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{where}: the tokenizer's pre-tokeniser {pre!r} is not known ({', '.join(PRE_TOKENIZERS)} are): {REMEDY}"
        )
    count = _true_count(metadata)
    tokens, types = metadata["tokenizer.ggml.tokens"][:count], metadata["tokenizer.ggml.token_type"][:count]
    words = max((i + 1 for i, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED)), default=0)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens[:words])}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": pre in WHOLE_WORDS, "vocab": vocab, "merges": _merges(metadata, vocab, where)}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    content |= {"normalizer": NORMALIZERS.get(pre), "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": None}
    content |= {"decoder": BYTES | {"add_prefix_space": True}, "model": model}
    return json.dumps(content, ensure_ascii=False)


def _merges(metadata: dict[str, Any], vocab: dict[str, int], where: object) -> list[list[str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise ValueError(f"{where}: tokenizer.ggml.merges is no list of strings: {REMEDY}")
    pairs = [merge.split(" ", 1) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ValueError(f"{where}: the merge {merge!r} is not of two tokens to a third: {REMEDY}")
    return pairs


def _true_count(metadata: dict[str, Any]) -> int:
    """How many tokens there are without the unused [PAD7] at the end."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return count


def sentencepiece_model(metadata: dict[str, Any]) -> bytes:
    """tokenizer.model of a llama-kind tokenizer. GGUF need not say everything: repeated spaces are kept, as in LLaMA's
    own, unless the metadata says otherwise. User-defined tokens have plain spaces in GGUF."""
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    count = _true_count(metadata)
    types = get("token_type")[:count]
    model = SentencePieceModel(
        pieces=[t.replace(" ", "▁") if k == USER_DEFINED else t for t, k in zip(get("tokens")[:count], types)],
        scores=get("scores")[:count],
        types=types,
        ids={short: -1 if get(key) is None or get(key) >= count else get(key) for short, key in IDS.items()},
        add_space_prefix=bool(get("add_space_prefix", True)),
        remove_extra_whitespaces=bool(get("remove_extra_whitespaces", False)),
        charsmap=bytes(get("precompiled_charsmap", b"")),
    )
    return sentencepiece_proto.write(model)
