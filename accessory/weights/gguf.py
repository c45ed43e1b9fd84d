"""What a GGUF file of architecture `llama` says, in Meta's terms: names, params.json's keys, tokenizer files.

    blk.3.attn_q.weight        layers.3.attention.wq.weight      (rows already interleaved as Meta's: no reordering)
    llama.attention.head_count n_heads
    tokenizer.ggml.*           tokenizer.json (gpt2 kind, byte-level BPE) or tokenizer.model (llama kind, sentencepiece)

Everything here is a function of the metadata, a dict of GGUF's keys; `checkpoint.formats_read.GGUFFile` reads the file.
Formats: github.com/ggml-org/ggml docs/gguf.md, sentencepiece's sentencepiece_model.proto. Test: tests/unit/test_gguf.py
"""

import json
import re
import struct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from accessory.model import rope

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
ROPE_FACTORS = "rope_freqs.weight"  # one divisor per frequency: how GGUF stores Llama 3.1's scaling
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # token types; GGUF's numbers are sentencepiece's


def meta_names(names: Iterable[str]) -> dict[str, str]:
    """Meta's name -> GGUF's. A tensor without a counterpart keeps its name, for the strict check to report."""
    return {meta_name(n): n for n in names if n != ROPE_FACTORS}


def meta_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES:
        return name
    return f"{f'layers.{match[1]}.' if match[1] else ''}{NAMES[match[2]]}.{match[3]}"


def params_from_metadata(metadata: dict[str, Any], where: object, rope_factors: Tensor | None = None) -> dict[str, Any]:
    """params.json's keys. Raises ValueError naming `where` and the key for another architecture or a missing size."""
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"{where}: general.architecture {kind!r} is another architecture: only llama is read")
    if metadata.get("llama.expert_count"):
        raise ValueError(
            f"{where}: llama.expert_count {metadata['llama.expert_count']}: mixtures of experts are not supported"
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(
                f"{where}: llama.{key} is missing: the file is incomplete, convert the model to GGUF again"
            )
        return value

    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", dim // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{where}: llama.{key} is {get(key)}, but the head dim is {head_dim}: not supported")
    params = {
        "dim": dim,
        "n_layers": get("block_count"),
        "n_heads": heads,
        "n_kv_heads": get("attention.head_count_kv", heads),
        "vocab_size": get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        "hidden_dim": get("feed_forward_length"),
        "norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "max_position_embeddings": get("context_length"),
    }
    if head_dim * heads != dim:
        params["head_dim"] = head_dim
    if scaling := _rope_scaling(metadata, where, head_dim, params["rope_theta"], rope_factors):
        params["rope_scaling"] = scaling
    return params


def _shortest(value: float) -> float:
    """A float32 as the number it was meant to be: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def _rope_scaling(
    metadata: dict[str, Any], where: object, head_dim: int, theta: float, rope_factors: Tensor | None
) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if rope_factors is not None:
        scaling = {"rope_type": "llama3", "factor": _shortest(float(rope_factors.max())), "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        plain, scaled = rope.frequencies(head_dim, theta, None)[0], rope.frequencies(head_dim, theta, scaling)[0]
        if rope_factors.shape != plain.shape or not torch.allclose(plain / scaled, rope_factors, rtol=1e-3):
            raise ValueError(f"{where}: {ROPE_FACTORS} is not Llama 3.1's scaling: not supported")
        return scaling
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{where}: llama.rope.scaling.type {kind!r} is not supported: linear and yarn are")
    scaling = {"rope_type": kind, "factor": metadata["llama.rope.scaling.factor"]}
    if kind == "yarn":
        context = metadata.get("llama.rope.scaling.original_context_length", metadata["llama.context_length"])
        scaling["original_max_position_embeddings"] = context
    return scaling


def tokenizer_files(metadata: dict[str, Any], where: object) -> dict[str, bytes]:
    """File name -> content of the tokenizer inside the GGUF: tokenizer.json or tokenizer.model, and
    tokenizer_config.json with its bos, eos and chat template. Raises ValueError for a kind that cannot be rebuilt,
    naming --tokenizer_path."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        files = {"tokenizer.json": byte_level_bpe(metadata, where).encode()}
    elif kind == "llama":
        files = {"tokenizer.model": sentencepiece_model(metadata)}
    else:
        raise ValueError(
            f"{where}: a tokenizer of kind {kind!r} cannot be rebuilt: give the model's own with --tokenizer_path"
        )
    config = json.dumps(tokenizer_config(metadata), indent=2, ensure_ascii=False)
    return files | {"tokenizer_config.json": config.encode()}


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as Hugging Face and `accessory.tokenizer` read it."""
    get, tokens = (lambda key: metadata.get(f"tokenizer.ggml.{key}")), metadata["tokenizer.ggml.tokens"]
    spm = get("model") == "llama"
    config = {"tokenizer_class": "LlamaTokenizer" if spm else "PreTrainedTokenizerFast"}
    bos_by_default = spm or get("pre") == "llama-bpe"
    config["add_bos_token"] = bos_by_default if get("add_bos_token") is None else get("add_bos_token")
    config["add_eos_token"] = bool(get("add_eos_token"))
    for short, key in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("unk", "unknown_token_id"),
        ("pad", "padding_token_id"),
    ):
        if get(key) is not None:
            config[f"{short}_token"] = tokens[get(key)]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    if "llama.context_length" in metadata:
        config["model_max_length"] = metadata["llama.context_length"]
    return config


def byte_level_bpe(metadata: dict[str, Any], where: object) -> str:
    """tokenizer.json of a gpt2-kind tokenizer, rebuilt from tokens, merges and the name of its pre-tokeniser."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise ValueError(f"{where}: its tokenizer needs the tokenizers package: pip install tokenizers") from None

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre == "llama-bpe":
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), plain])
    elif pre == "gpt-2":
        splitter = byte_level
    else:
        raise ValueError(
            f"{where}: the tokenizer's pre-tokeniser {pre!r} is not known (smollm, llama-bpe, gpt-2 are): "
            "give the model's own tokenizer with --tokenizer_path"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == USER_DEFINED])
    return tokenizer.to_str(pretty=False)


def sentencepiece_model(metadata: dict[str, Any]) -> bytes:
    """tokenizer.model of a llama-kind tokenizer: sentencepiece's ModelProto, written field by field. GGUF does not keep
    everything: extra spaces are kept, as in LLaMA's own, unless the metadata says otherwise."""
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    tokens, types = get("tokens"), get("token_type")
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, get("scores"), types)
    )
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, int(BYTE in types))  # type BPE, size, byte fallback
    for field, key in ((40, "unknown_token_id"), (41, "bos_token_id"), (42, "eos_token_id"), (43, "padding_token_id")):
        token = get(key)
        trainer += _number(field, -1 if token is None else token)
        if token is not None and field < 43:
            trainer += _message(field + 5, tokens[token].encode())  # unk_piece 45, bos_piece 46, eos_piece 47
    normalizer = _message(1, b"identity") + _number(3, int(get("add_space_prefix", True)))
    normalizer += _number(4, int(get("remove_extra_whitespaces", False))) + _number(5, 1)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    value, out = value & 0xFFFFFFFFFFFFFFFF, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
