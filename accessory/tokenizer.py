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

Where special tokens are wanted out of a text, `encode_with_specials` reads them and `decode_with_specials` writes them.
`with_special_tokens` adds some as new ids after the vocabulary; `save` keeps them where Hugging Face does, in
added_tokens.json beside a tokenizer.model and inside a tokenizer.json, and `open` reads them back. The text after a
special token has two spellings where sentencepiece puts a space before a text:

    legacy   <A>hi -> [A, "▁hi"]    every part is a text of its own     transformers' legacy=True, and all before 4.31
    plain    <A>hi -> [A, "hi"]     only the first part gets the space  transformers' legacy=False

The files themselves are read in tokenizer_files.py. Test: pytest tests/unit/test_tokenizer.py
"""

import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from accessory.tokenizer_files import (
    ADDED_FILE,
    LLAMA3_SPLIT,
    MAX_BYTES,
    SIDECARS,
    TIKTOKEN_LINE,
    added_beside,
    find,
    from_byte_level,
    id_list,
    llama3_parts,
    read_ranks,
    require,
    sidecars,
    to_byte_level,
)

MAX_SPARE_ROWS = 512  # an embedding may have so many rows more than the tokenizer has tokens: published ones are padded
SPACINGS = ("legacy", "plain")
PLACEHOLDER = re.compile(r"(?i)[<\[]\W*(unused|reserved|extra|dummy)\w*\W*[>\]]")
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
    special_tokens  name -> id of every token that stands for no text: control pieces, Llama 3's 256, what was added
    added_tokens    those of them that stand in ADDED_FILE, not in the tokenizer's own file
    spacing     "legacy" | "plain", what `encode_with_specials` does unless told: as `legacy` in a tokenizer_config.json
                beside it says, else legacy
    """

    kind: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    spacing: str = "legacy"
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

    @staticmethod
    def open_for(path: str | Path, rows: int, weights: Any) -> "Tokenizer":
        """`open`, and ValueError where the embedding's `rows` in `weights` are not for this tokenizer: ids would mean others."""
        tokenizer = Tokenizer.open(path)
        if not 0 <= rows - tokenizer.vocab_size <= MAX_SPARE_ROWS:
            raise ValueError(
                f"--tokenizer_path {path} has {tokenizer.vocab_size} tokens, the embedding of {weights} has {rows} rows: they do not belong together, name the checkpoint's own, or grow the model with tools/expand_vocab.py"
            )
        return tokenizer

    def __init__(self, path: Path, raw: bytes, added: dict[str, int] | None = None):
        self.path, self.raw = path, raw
        self.special_tokens: dict[str, int] = {}
        self.added_tokens = dict(added) if added is not None else self._added_beside()
        self._load(raw)
        if not self.vocab_size:
            raise ValueError(f"{path} holds no tokens: check --tokenizer_path, or copy the file again")
        self._adds_space = self._piece((self._ids("a") or [0])[0]).startswith("▁")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, BOS before and EOS after where asked. ValueError where the tokenizer has no such id."""
        head = [self._required(self.bos_id, "BOS")] if bos else []
        tail = [self._required(self.eos_id, "EOS")] if eos else []
        return head + self._ids(text) + tail

    def encode_with_specials(
        self, text: str, spacing: str | None = None, bos: bool = False, eos: bool = False
    ) -> list[int]:
        """The ids of `text`, in which the names in `special_tokens` are those tokens, the longest name first.

        Not for what a user typed: that goes through `encode`. `spacing`: see above; None: the tokenizer's own."""
        if spacing not in (None, *SPACINGS):
            raise ValueError(f"spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
        ids: list[int] = []
        for part in self._special_names.split(text) if self.special_tokens else [text]:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                whole = not ids or (spacing or self.spacing) == "legacy"
                ids += self._ids(part) if whole else self.encode_continuation(part)
        return [*self.encode("", bos=bos), *ids, *self.encode("", eos=eos)]

    def decode_with_specials(self, ids: Sequence[int], spacing: str | None = None) -> str:
        """The text of `ids` with the special tokens by name: what `encode_with_specials` of that spacing was given."""
        names = {i: name for name, i in self.special_tokens.items()}
        text, part = "", []
        legacy, anchor = (spacing or self.spacing) == "legacy", self._ids(":")
        for i in [*map(int, ids), None]:
            if i is not None and i not in names:
                part.append(i)
                continue
            text += self.decode(part, after=() if legacy or not text else anchor)
            text, part = text + names.get(i, ""), []
        return text

    def with_special_tokens(self, tokens: Iterable[str]) -> "Tokenizer":
        """This tokenizer with `tokens` as special tokens: a new object, ids after the last one, in the order given.

        A name that is special already keeps its id; one that is a piece (sentencepiece, tokenizer.json) keeps its id
        too and is special from now on. ValueError for a name that is empty or has spaces around it."""
        tokens = list(dict.fromkeys(tokens))
        for token in tokens:
            if not isinstance(token, str) or not token or token != token.strip():
                raise ValueError(f"special token {token!r}: expected a text without spaces around it")
        return self._with_added([token for token in tokens if token not in self.special_tokens])

    def _with_added(self, tokens: list[str]) -> "Tokenizer":
        after, added = self.vocab_size, dict(self.added_tokens)
        for token in tokens:
            known = self._id_of(token)
            added[token] = after if known is None else known
            after += known is None
        return type(self)(self.path, self.raw, added)

    def _added_beside(self) -> dict[str, int]:
        return added_beside(self.path)

    def _take_added(self) -> None:
        """Puts `added_tokens` among `special_tokens`, once the file's own are there, and counts them. What tells only
        that a token of the file's own is special is no addition."""
        size, taken = self.vocab_size, {}
        for token, i in sorted(self.added_tokens.items(), key=lambda item: item[1]):
            if i < size and self._piece(i) != token and not self._is_placeholder(i):
                if self.kind == "sentencepiece" and token not in self.special_tokens:
                    raise ValueError(
                        f"{self.path}: id {i} is {self._piece(i)!r} here and {token!r} in {ADDED_FILE} or {SIDECARS[0]} "
                        "beside it: they belong to different tokenizers, remove the wrong one"
                    )
                continue
            if i in taken.values():
                raise ValueError(f"{self.path.with_name(ADDED_FILE)}: id {i} has two names: repair it")
            if token not in self.special_tokens:
                taken[token] = i
        self.added_tokens = taken
        self.special_tokens |= taken
        self.vocab_size = max([size, *(i + 1 for i in taken.values())])

    def _is_placeholder(self, token: int) -> bool:
        """Whether the file keeps this id free for a special token: "<reserved_7>", "[UNUSED_TOKEN_141]"."""
        return bool(PLACEHOLDER.fullmatch(self._piece(token)))

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

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

    def tokens(self) -> list[bytes]:
        """What each id stands for: equal entries mean the same token, whatever the kinds (a Llama 3 tiktoken file and
        its tokenizer.json give the same list). Sentencepiece's space stays "▁"; b"" for an id that nothing has."""
        return list(self._pieces())

    def split_token(self, token: bytes) -> list[int]:
        """The ids in this tokenizer of one token of another, as `tokens` gives it."""
        return self.encode_continuation(token.decode(errors="replace").replace("▁", " "))

    def save(self, directory: str | Path) -> Path:
        """Writes the file under its kind's standard name, the added tokens, and copies what beside it names its BOS and
        EOS. -> the file."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*SIDECARS, "chat_template.jinja"):
            source = self.path.with_name(name)
            if source.is_file() and source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)
        file = directory / self.standard_name
        if not file.is_file() or file.read_bytes() != self.raw:
            file.write_bytes(self.raw)
        if self.added_tokens:
            (directory / ADDED_FILE).write_text(json.dumps(self.added_tokens, indent=2, ensure_ascii=False) + "\n")
        return file

    def note_on_export(self) -> list[str]:
        """Lines for who opens the file with transformers; mostly none."""
        return []

    def _required(self, token: int | None, name: str) -> int:
        if token is None:
            raise ValueError(f"{self.path} names no {name} token: put its tokenizer_config.json beside it")
        return token


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
        special = (i for i in range(self.vocab_size) if self.model.is_control(i) or self.model.is_unknown(i))
        self.special_tokens = {self._piece(i): i for i in special}
        self._take_added()
        beside = sidecars(self.path)
        own = {"bos": self.model.bos_id(), "eos": self.model.eos_id(), "pad": self.model.pad_id()}
        named = {name: self._id_of(str(beside.get(f"{name}_token", ""))) for name in own}
        ids = (named[name] if named[name] is not None else i if i >= 0 else None for name, i in own.items())
        self.bos_id, self.eos_id, self.pad_id = ids
        stops = (self.eos_id, own["eos"], *(self.added_tokens.get(name) for name in STOP_TOKENS))
        self.eos_ids = tuple(dict.fromkeys(i for i in stops if i is not None and i >= 0))
        self.add_bos = self.bos_id is not None and bool(beside.get("add_bos_token", True))
        self.spacing = "legacy" if beside.get("legacy", True) else "plain"

    def note_on_export(self) -> list[str]:
        """transformers 5 takes a smaller id for a larger score. Pieces appended with score 0 tie and win over all others."""
        model = self.model
        others = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
        text = (i for i in reversed(range(model.vocab_size())) if not any(test(i) for test in others))
        if model.get_score(next(text, 0)) < 0:
            return []
        return [
            f"note: transformers 5's AutoTokenizer cuts text in another way than {self.path.name}, whose added pieces have score 0: "
            "there take transformers.SentencePieceBackend.from_pretrained(DIR), which puts no BOS in front"
        ]

    def _ids(self, text: str) -> list[int]:
        return self.model.encode(text)

    def _text(self, ids: list[int]) -> str:
        added = set(self.added_tokens.values())
        return self.model.decode([i for i in ids if i not in added] if added else ids)

    def _piece(self, token: int) -> str:
        if token < self.model.vocab_size():
            return self.model.id_to_piece(token)
        return next((name for name, i in self.added_tokens.items() if i == token), "")

    def _id_of(self, token: str) -> int | None:
        found = self.special_tokens.get(token, self.model.piece_to_id(token))
        return found if token in self.special_tokens or found != self.model.unk_id() else None

    def _pieces(self) -> Iterator[bytes]:
        names = {i: name for name, i in self.added_tokens.items()}
        size = self.model.vocab_size()
        return ((self._piece(i) if i < size else names.get(i, "")).encode() for i in range(self.vocab_size))


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
        self.special_tokens, self.vocab_size = dict(special), len(self.ranks) + len(special)
        self._take_added()
        self.bos_id, self.eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        self.pad_id = special["<|finetune_right_pad_id|>"]
        stops = (self.added_tokens.get(name) for name in STOP_TOKENS)
        self.eos_ids = (self.eos_id, special["<|eom_id|>"], special["<|eot_id|>"], *(i for i in stops if i is not None))
        self.add_bos = True

    def _ids(self, text: str) -> list[int]:
        return [token for part in llama3_parts(text) for token in self.model.encode_ordinary(part)]

    def _text(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < len(self.ranks)])

    def _piece(self, token: int) -> str:
        return ""  # byte-level: no space is ever added

    def _id_of(self, token: str) -> int | None:
        return self.special_tokens.get(token)

    def _pieces(self) -> Iterator[bytes]:
        yield from sorted(self.ranks, key=self.ranks.__getitem__)
        names = {i: name for name, i in self.special_tokens.items()}
        yield from (names.get(i, "").encode() for i in range(len(self.ranks), self.vocab_size))

    def split_token(self, token: bytes) -> list[int]:
        try:
            return self._ids(token.decode())
        except UnicodeDecodeError:  # a part of a character
            return [self.ranks[bytes([b])] for b in token]


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
        decoder = self.model.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: i for i, token in decoder if token.special}
        beside = sidecars(self.path)
        self.spacing = "plain" if beside.get("legacy") is False else "legacy"
        self._find_special_ids(beside, self._post_processor_bos())

    def _added_beside(self) -> dict[str, int]:
        return {}  # they are in the file itself

    def _with_added(self, tokens: list[str]) -> "Tokenizer":
        content = json.loads(self.raw.decode("utf-8-sig"))
        known = {token: self.model.token_to_id(token) for token in tokens}
        new = iter(range(self.vocab_size, self.vocab_size + len(tokens)))
        ids = {token: next(new) if i is None else i for token, i in known.items()}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entries = [{"id": i, "content": token, **flags, "special": True} for token, i in ids.items()]
        others = [entry for entry in content.get("added_tokens") or [] if entry["content"] not in ids]
        content["added_tokens"] = sorted([*others, *entries], key=lambda entry: entry["id"])
        grown = HuggingFace(self.path, json.dumps(content, ensure_ascii=False).encode())
        if wrong := [token for token, i in ids.items() if grown.special_tokens.get(token) != i]:
            raise ValueError(f"{self.path}: {wrong[0]!r} cannot be added: the ids of this vocabulary have gaps")
        return grown

    @cached_property
    def _reads_specials(self) -> Any:
        """The library's tokenizer of the file as Hugging Face runs it, special tokens read out of the text."""
        return importlib.import_module("tokenizers").Tokenizer.from_str(self.raw.decode("utf-8-sig"))

    def encode_with_specials(
        self, text: str, spacing: str | None = None, bos: bool = False, eos: bool = False
    ) -> list[int]:
        """As above; without `spacing` by the file's own rules, for spaces around a special token too (Hugging Face)."""
        if spacing is not None:
            return super().encode_with_specials(text, spacing, bos, eos)
        ids = self._reads_specials.encode(text, add_special_tokens=False).ids
        return [*self.encode("", bos=bos), *ids, *self.encode("", eos=eos)]

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

    @cached_property
    def byte_level(self) -> bool:
        """Whether pieces are written in GPT-2's alphabet, a character for each byte."""
        return "ByteLevel(" in str(self.model.decoder)

    def tokens(self) -> list[bytes]:
        if not self.byte_level:
            return super().tokens()
        added = {i: token.content for i, token in self.model.get_added_tokens_decoder().items()}
        return [added[i].encode() if i in added else from_byte_level(self._piece(i)) for i in range(self.vocab_size)]

    def split_token(self, token: bytes) -> list[int]:
        if not self.byte_level:
            return super().split_token(token)
        return [part.id for part in self.model.model.tokenize(to_byte_level(token))]
