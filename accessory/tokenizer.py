"""Text <-> token ids for the three kinds of tokenizer file that LLaMA-family checkpoints come with.

    Tokenizer.open(path) -- looks into the file -->
        sentencepiece   tokenizer.model   Llama 1/2, Code Llama, Mistral, TinyLlama
        tiktoken        tokenizer.model   Llama 3: lines of "base64-token rank"
        hf              tokenizer.json    SmolLM2 and what Hugging Face saves

One meaning for all three. `encode` never reads special tokens out of the text: "</s>" or "<|eot_id|>" typed by a user
is ordinary characters (sentencepiece: control pieces cannot come from text, user-defined pieces do; tiktoken: ordinary
text only; hf: only added tokens that are not marked special are matched). BOS and EOS are ids, put there by `bos=` and
`eos=` alone: the post-processor of a tokenizer.json is never run, so nothing is added twice. `decode` gives special
tokens no text, so decode(encode(text, bos=True, eos=True)) == text wherever the tokenizer's normaliser loses nothing.

Test: pytest tests/unit/test_tokenizer.py
"""

import base64
import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

# What may lie beside a tokenizer and name its BOS and EOS, strongest first; the model's config.json comes after them.
SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
# (BOS, EOS) of a tokenizer.json with nothing beside it: the first pair that is among its added tokens. A fine-tune adds
# ChatML's pair to a base that has <s> or <|begin_of_text|>, so the base's come first; SmolLM2 has ChatML's alone.
KNOWN_PAIRS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|im_start|>", "<|im_end|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
# Further tokens that end an answer, whatever a tokenizer.json calls its EOS.
STOP_TOKENS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>")
MAX_BYTES = 2**28  # the largest known has 2**25; a checkpoint named by mistake is not read
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
# Llama 3's pattern, limits on what tiktoken gets at once, and names, as in llama-models 0.3.0, llama3/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_MAX_CHARS, LLAMA3_MAX_RUN = 400_000, 25_000
LLAMA3_SPECIAL_COUNT = 256
LLAMA3_SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)


class Tokenizer:
    """A tokenizer file, opened. Ids are ints in [0, vocab_size); safe to use from several threads.

    kind        "sentencepiece" | "tiktoken" | "hf"
    vocab_size  the largest id + 1 (not padded to anything)
    bos_id      None where there is none; eos_id and pad_id likewise
    eos_ids     every id that ends an answer, eos_id first (Llama 3: end_of_text, eom, eot); () where there is none
    add_bos     whether this family's models expect BOS before a text: sentencepiece and Llama 3 do; a tokenizer.json
                as its post-processor says (SmolLM2: no); `add_bos_token` in a tokenizer_config.json beside it wins
    """

    kind: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    standard_name = "tokenizer.model"

    @staticmethod
    def open(path: str | Path) -> "Tokenizer":
        """The tokenizer in a file, or in a directory: its tokenizer.model, else its tokenizer.json.

        The kind is told by the content, whatever the file is called. ValueError names the path and what is wrong."""
        file = find(Path(path))
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes, too large for a tokenizer: check --tokenizer_path"
            )
        raw = file.read_bytes()
        if raw.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not a tokenizer: fetch the real file with `git lfs pull`")
        if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return HuggingFace(file, raw)
        return Tiktoken(file, raw) if TIKTOKEN_LINE.match(raw) else SentencePiece(file, raw)

    def __init__(self, path: Path, raw: bytes):
        self.path = path
        self._load(raw)
        if not self.vocab_size:
            raise ValueError(f"{path} holds no tokens: check --tokenizer_path, or copy the file again")
        self._adds_space = self._piece((self._ids("a") or [0])[0]).startswith("▁")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, BOS before and EOS after where asked. ValueError where the tokenizer has no such id."""
        head = [self._required(self.bos_id, "BOS")] if bos else []
        tail = [self._required(self.eos_id, "EOS")] if eos else []
        return head + self._ids(text) + tail

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of `text` as it goes on after earlier text: without the space that sentencepiece puts before a text.

        Found by encoding it after an anchor that it does not merge with, and cutting the anchor's ids off."""
        for anchor in ("\n", ":", "a") if self._adds_space else ():
            head, both = self._ids(anchor), self._ids(anchor + text)
            if head and both[: len(head)] == head:
                return both[len(head) :]
        return self._ids(text)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids`, special tokens left out; with `after`, what they add to the text of the ids before them.

        An answer's ids want `after`: alone, sentencepiece would take the space off their first word. Bytes that are no
        UTF-8 become U+FFFD."""
        if not len(after):
            return self._text([int(i) for i in ids])
        before = self._text([int(i) for i in after])
        whole = self._text([int(i) for i in (*after, *ids)])
        return whole[len(before) :] if whole.startswith(before) else self._text([int(i) for i in ids])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the kind and all pieces in the order of their ids: equal where ids mean the same."""
        digest = hashlib.sha256(self.kind.encode())
        for piece in self._pieces():
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> Path:
        """Copies the file under its kind's standard name, and what beside it names its BOS and EOS. -> the copy."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for source, name in [(self.path, self.standard_name), *((self.path.with_name(n), n) for n in SIDECARS)]:
            if source.is_file() and source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)
        return directory / self.standard_name

    def _required(self, token: int | None, name: str) -> int:
        if token is None:
            raise ValueError(f"{self.path} names no {name} token: put its tokenizer_config.json beside it")
        return token


def find(path: Path) -> Path:
    """A file as it is; in a directory tokenizer.model, else tokenizer.json. ValueError where there is neither."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"--tokenizer_path {path}: no such file or directory")
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"--tokenizer_path {path}: no tokenizer.model or tokenizer.json there: name the file itself")


class SentencePiece(Tokenizer):
    """A sentencepiece model. The file itself knows its BOS, EOS and padding."""

    kind = "sentencepiece"

    def _load(self, raw: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_proto=raw)
            self.vocab_size = self.model.vocab_size()
        except RuntimeError:
            raise ValueError(
                f"{self.path} ({len(raw)} bytes) is no complete tokenizer file (sentencepiece, Llama-3 tiktoken or "
                "tokenizer.json): check --tokenizer_path, or copy the file again"
            ) from None
        ids = (self.model.bos_id(), self.model.eos_id(), self.model.pad_id())
        self.bos_id, self.eos_id, self.pad_id = (None if i < 0 else i for i in ids)
        self.eos_ids = () if self.eos_id is None else (self.eos_id,)
        self.add_bos = self.bos_id is not None and bool(sidecars(self.path).get("add_bos_token", True))

    def _ids(self, text: str) -> list[int]:
        return self.model.encode(text)

    def _text(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def _piece(self, token: int) -> str:
        return self.model.id_to_piece(token)

    def _pieces(self) -> Iterator[bytes]:
        return (self._piece(i).encode() for i in range(self.vocab_size))


class Tiktoken(Tokenizer):
    """Llama 3's file: the ranks of its byte pairs. The 256 special tokens after them have no line in the file."""

    kind = "tiktoken"

    def _load(self, raw: bytes) -> None:
        tiktoken = require("tiktoken", self.path)
        self.ranks = read_ranks(self.path, raw)
        reserved = range(2, 2 + LLAMA3_SPECIAL_COUNT - len(LLAMA3_SPECIAL_TOKENS))
        names = (*LLAMA3_SPECIAL_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in reserved))
        special = {name: len(self.ranks) + i for i, name in enumerate(names)}
        self.model = tiktoken.Encoding(
            name=self.path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=self.ranks, special_tokens=special
        )
        self.special_tokens, self.vocab_size = special, len(self.ranks) + len(special)
        self.bos_id, self.eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        self.pad_id = special["<|finetune_right_pad_id|>"]
        self.eos_ids = (self.eos_id, special["<|eom_id|>"], special["<|eot_id|>"])
        self.add_bos = True

    def _ids(self, text: str) -> list[int]:
        return [token for part in llama3_parts(text) for token in self.model.encode_ordinary(part)]

    def _text(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < len(self.ranks)])

    def _piece(self, token: int) -> str:
        return ""  # byte-level: no space is ever added

    def _pieces(self) -> Iterator[bytes]:
        yield from sorted(self.ranks, key=self.ranks.__getitem__)
        yield from (name.encode() for name in self.special_tokens)


def read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """The lines "base64 rank" of a tiktoken file. ValueError names the line that is none, or a rank that is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one too
            if line.strip():
                raise ValueError(f"{path}:{number}: not a line 'base64-token rank': copy the file again") from None
    missing = set(range(len(ranks))) - set(ranks.values())
    if missing or not all(bytes([b]) in ranks for b in range(256)):
        what = f"rank {min(missing)}" if missing else "a single byte"
        raise ValueError(f"{path}: {what} is missing among its {len(ranks)} tokens: copy the file again")
    return ranks


def llama3_parts(text: str) -> Iterator[str]:
    """`text` cut where Meta's code cuts it, so that tiktoken's regex survives: every 400,000 characters, and inside
    those wherever a run of spaces, or of anything but spaces, is longer than 25,000."""
    for start in range(0, len(text), LLAMA3_MAX_CHARS):
        part = text[start : start + LLAMA3_MAX_CHARS]
        runs = (m.span() for m in re.finditer(r"\s+|\S+", part)) if len(part) > LLAMA3_MAX_RUN else ()
        cuts = [cut for first, stop in runs for cut in range(first + LLAMA3_MAX_RUN, stop, LLAMA3_MAX_RUN)]
        yield from (part[a:b] for a, b in pairwise([0, *cuts, len(part)]))


class HuggingFace(Tokenizer):
    """A tokenizer.json. The files beside it say which tokens are BOS, EOS and padding, else KNOWN_PAIRS."""

    kind = "hf"
    standard_name = "tokenizer.json"

    def _load(self, raw: bytes) -> None:
        tokenizers = require("tokenizers", self.path)
        try:
            self.model = tokenizers.Tokenizer.from_str(raw.decode("utf-8-sig"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path}: not a complete tokenizer.json ({error}): copy the file again") from None
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True  # as text, that is
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._find_special_ids(sidecars(self.path), self._post_processor_bos())

    def _post_processor_bos(self) -> int | None:
        """The one id that the file's own post-processor puts before a text, if it does."""
        plain, processed = self._ids("a"), self.model.encode("a").ids
        return processed[0] if plain and processed[1 : len(plain) + 1] == plain and processed != plain else None

    def _find_special_ids(self, beside: dict[str, Any], put_in_front: int | None) -> None:
        """Sets bos_id, eos_id, pad_id, eos_ids, add_bos: from the files beside, the post-processor, known names."""
        added = {token.content: i for i, token in self.model.get_added_tokens_decoder().items()}
        listed = {name: id_list(beside.get(f"{name}_token_id"), self.vocab_size) for name in ("bos", "eos", "pad")}
        named = {name: self.model.token_to_id(str(beside.get(f"{name}_token", ""))) for name in listed}
        found = {name: next((i for i in (named[name], *listed[name]) if i is not None), None) for name in listed}
        bos, eos = found["bos"] if found["bos"] is not None else put_in_front, found["eos"]
        for first, last in KNOWN_PAIRS if eos is None else ():
            if first in added and last in added and bos in (None, added[first]):
                bos, eos = added[first], added[last]
                break
        self.bos_id, self.eos_id, self.pad_id = bos, eos, found["pad"]
        stops = (eos, *listed["eos"], *(added.get(name) for name in STOP_TOKENS))
        self.eos_ids = tuple(dict.fromkeys(i for i in stops if i is not None))
        self.add_bos = bos is not None and bool(beside.get("add_bos_token", put_in_front is not None))

    def _ids(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)

    def _piece(self, token: int) -> str:
        return self.model.id_to_token(token) or ""

    def _pieces(self) -> Iterator[bytes]:
        return (self._piece(i).encode() for i in range(self.vocab_size))


def sidecars(path: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of special tokens, a stronger file over a weaker one, nulls left out:
    {bos,eos,pad}_token as strings, {bos,eos,pad}_token_id, add_bos_token. ValueError names a file that is no object."""
    said: dict[str, Any] = {}
    for name in ("config.json", *reversed(SIDECARS)):
        file = path.with_name(name)
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error}): repair or remove it") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file}: not a JSON object: repair or remove it")
        for key, value in content.items():
            if isinstance(value, dict) and key.endswith("_token"):
                value = value.get("content")
            if value is not None and re.fullmatch(r"(bos|eos|pad)_token(_id)?|add_bos_token", key):
                said[key] = value
    return said


def id_list(value: int | list[int] | None, vocab_size: int) -> list[int]:
    """generation_config's *_token_id, one id or several, without those that the tokenizer does not have."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and 0 <= i < vocab_size]


def require(library: str, path: Path) -> Any:
    """The imported library; ValueError with the line that installs it where it is not there."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(f"{path} needs the package {library}: pip install {library}") from None
