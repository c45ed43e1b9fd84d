"""A dialog, the pieces that a template makes of it, and their ids with the label of each.

    Dialog [Message, ...] --template--> [Piece, ...] --Encoder--> [Run, ...] --fit--> ids, learnt

A template hands over its special tokens as ids and everything else as ordinary characters, so a special token that
somebody typed is never one: there is nothing to escape. Two ways to make ids of a prompt and the answer after it:

    joint      one text, where that begins with the prompt's own ids; else the answer as a continuation   Stanford Alpaca
    separate   each a text of its own (sentencepiece then puts a space before the answer)  Chinese-LLaMA-Alpaca, MiniMA

Either way every token is wholly prompt or wholly answer, and the ids before an answer are those that generation starts
from. Test: pytest tests/unit/test_dialog.py
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from functools import cache
from typing import NamedTuple, Protocol

from ..tokenizer import Tokenizer

ANSWERS = ("assistant", "text")
TRAIN_ON = ("all", "last", "flagged", "text", "pads")
TOKENIZE = ("joint", "separate")
LONG, APART = 1024, 64  # characters: of a text that no piece tokenises again; of what keeps two pieces apart


class Message(NamedTuple):
    """What one side said. `train`: whether the record wants it learnt, None where it does not say."""

    role: str  # system, user, assistant, tool; text: a whole text with nothing around it
    text: str
    train: bool | None = None
    input: str = ""  # Alpaca's second field

    @property
    def words(self) -> str:
        """Text and input as one, for templates that have no place for an input."""
        return f"{self.text}\n{self.input}" if self.input else self.text


class Dialog(NamedTuple):
    """One record."""

    where: str  # for messages: "data.jsonl:17"
    kind: str  # the format it was in: picks the template where none is named
    messages: tuple[Message, ...]


class Piece(NamedTuple):
    """A part of what a template writes."""

    content: str | int  # ordinary characters | the id of a token
    message: int | None = None  # whose words, or whose end: learnt with that message; None: the template's own
    cut: bool = False  # begins a text of its own
    end: bool = False  # what closes the message: stays where its words are cut


class Template(Protocol):
    """`pieces` words messages; learnt: the messages whose bounds matter; prompt: up to where an answer begins."""

    name: str
    tokenize: str  # the way it is used where nobody chooses: one of TOKENIZE

    def pieces(
        self, messages: Sequence[Message], learnt: Collection[int] = (), prompt: bool = False
    ) -> list[Piece]: ...


class Run(NamedTuple):
    """The ids of neighbouring pieces that are learnt alike."""

    ids: list[int]
    message: int | None
    end: bool


class Rules(NamedTuple):
    """The flags that decide over ids and labels."""

    train_on: str = "all"
    tokenize: str | None = None  # None: the template's own way
    max_seq_len: int = 512
    on_long: str = "truncate"


class Encoded(NamedTuple):
    ids: list[int]
    learnt: list[bool]  # one for each id
    cut: bool  # whether turns, or a part of the answer, were left out


def learnt_messages(dialog: Dialog, train_on: str) -> list[bool]:
    """Which messages are learnt. ValueError where `all` would go against what the record says of a message."""
    answers = [m.role in ANSWERS for m in dialog.messages]
    if train_on in ("text", "pads"):
        return [True] * len(answers)
    if train_on == "flagged":
        return [a if m.train is None else m.train for a, m in zip(answers, dialog.messages)]
    if train_on == "last":
        last = max((i for i, a in enumerate(answers) if a), default=-1)
        return [i == last for i in range(len(answers))]
    for i, (answer, message) in enumerate(zip(answers, dialog.messages), 1):
        if message.train not in (None, answer):
            raise ValueError(
                f'{dialog.where}: message {i} ({message.role}) has "train": {str(message.train).lower()}: choose '
                "--train_on flagged, or remove it"
            )
    return answers


class Encoder:
    """Pieces -> ids, for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.names = {i: name for name, i in tokenizer.special_tokens.items()}
        self.strips = cache(self._strips)
        name = next(iter(tokenizer.special_tokens), None)
        # whether the text after a special token begins like a text of its own, as this tokenizer's own files have it
        self.anew = name is None or tokenizer.encode_with_specials(f"{name}a")[1:] == tokenizer.encode("a")

    def runs(self, pieces: Sequence[Piece], apart: Collection[int], tokenize: str) -> list[Run]:
        """`apart`: the messages whose tokens must be wholly theirs: the answers, and what else is learnt."""
        runs: list[Run] = []
        # the text since the last id or cut, and its ids; what comes before it; its last piece, whose ids are the last run's
        text, head, before, anew, last = "", [], None, True, ""
        for piece, after in self._merged(pieces, apart):
            key = (piece.message, piece.end)
            if isinstance(piece.content, int):
                runs.append(Run([piece.content], *key))
                text, head, before, anew = "", [], piece.content, self.anew
                continue
            content = self._stripped(piece.content, before if not text else None, after)
            changed = bool(runs) and runs[-1].message != piece.message
            if piece.cut or tokenize == "separate" and changed and text:
                text, head, anew = "", [], True
            elif len(text) > LONG and self._stands_alone(last, runs[-1].ids):
                text, head, anew = last, runs[-1].ids, False
            encode = self.tokenizer.encode if anew else self.tokenizer.encode_continuation
            ids = encode(text + content)
            if ids[: len(head)] != head:
                ids = head + self.tokenizer.encode_continuation(content)
            runs.append(Run(ids[len(head) :], *key))
            text, head, last = text + content, ids, content
        return runs

    def _stands_alone(self, text: str, ids: list[int]) -> bool:
        """Whether what is before a text of these ids is of no account to it, and so to what follows: then a dialog without
        special tokens between its turns takes time as it is long, not as its square."""
        return len(text.strip()) > APART and self.tokenizer.encode_continuation(text) == ids

    def _merged(self, pieces: Sequence[Piece], apart: Collection[int]) -> list[tuple[Piece, int | None]]:
        """Neighbouring texts that need no bound between them as one piece; each with the id that follows it."""
        merged: list[Piece] = []
        for piece in pieces:
            if piece.message not in apart:
                piece = piece._replace(message=None, end=False)
            if merged and not piece.cut and _one_text(merged[-1], piece):
                merged[-1] = merged[-1]._replace(content=merged[-1].content + piece.content)
            else:
                merged.append(piece)
        follow = [p.content if isinstance(p.content, int) else None for p in merged[1:]]
        return list(zip(merged, [*follow, None]))

    def _stripped(self, text: str, before: int | None, after: int | None) -> str:
        """Without the spaces that a special token beside it swallows (`rstrip`, `lstrip` in a tokenizer.json)."""
        if before is not None and self.strips(before)[1]:
            text = text.lstrip()
        return text.rstrip() if after is not None and self.strips(after)[0] else text

    def _strips(self, token: int) -> tuple[bool, bool]:
        name, encode = self.names.get(token), self.tokenizer.encode_with_specials
        if name is None:
            return False, False
        return encode(f"a {name}") == encode(f"a{name}"), encode(f"{name} a") == encode(f"{name}a")


def _one_text(a: Piece, b: Piece) -> bool:
    are_text = isinstance(a.content, str) and isinstance(b.content, str)
    return are_text and (a.message, a.end) == (b.message, b.end)


def encode_prompt(messages: Sequence[Message], template: Template, encoder: Encoder) -> list[int]:
    """The ids that an answer to `messages` is generated from: those before it in training."""
    apart = [i for i, m in enumerate(messages) if m.role in ANSWERS]
    pieces = template.pieces(messages, prompt=True)
    return [i for run in encoder.runs(pieces, apart, template.tokenize) for i in run.ids]


def encode_dialog(dialog: Dialog, template: Template, encoder: Encoder, rules: Rules) -> Encoded | None:
    """-> ids and labels of at most max_seq_len; `learnt` is false everywhere where nothing is; None: dropped as too long.

    A longer dialog, with on_long truncate, loses what comes after its last learnt message, then whole turns from the
    oldest on (system messages stay); of a last turn that is too long by itself the answer is cut before its end, to whole
    characters and at least one token. ValueError, naming the record: the template cannot word it; on_long error."""
    learnt = learnt_messages(dialog, rules.train_on)
    runs = word(dialog, range(len(learnt)), learnt, template, encoder, rules)
    encoded = flat(runs, learnt, rules)
    if rules.train_on == "pads":
        return padded(encoded, encoder.tokenizer, rules.max_seq_len)
    if len(encoded.ids) <= rules.max_seq_len or not any(encoded.learnt[1:]):
        return encoded
    if rules.on_long == "error":
        raise ValueError(
            f"{dialog.where}: {len(encoded.ids)} tokens, more than --max_seq_len {rules.max_seq_len}: "
            "raise it, shorten the example, or choose --on_long truncate or drop"
        )
    return None if rules.on_long == "drop" else shortened(dialog, learnt, template, encoder, rules)


def word(
    dialog: Dialog, chosen: Sequence[int], learnt: list[bool], template: Template, encoder: Encoder, rules: Rules
) -> list[Run]:
    """The runs of the chosen messages. `message` counts among those."""
    messages = [dialog.messages[i] for i in chosen]
    wanted = [k for k, i in enumerate(chosen) if learnt[i] and rules.train_on not in ("text", "pads")]
    apart = {*wanted, *(k for k, m in enumerate(messages) if m.role in ANSWERS)}
    try:
        return encoder.runs(template.pieces(messages, wanted), apart, rules.tokenize or template.tokenize)
    except ValueError as error:
        raise ValueError(f"{dialog.where}: {error}") from None


def flat(runs: Sequence[Run], learnt: Sequence[bool], rules: Rules, cut: bool = False) -> Encoded:
    whole = rules.train_on in ("text", "pads")
    ids = [i for run in runs for i in run.ids]
    labels = [whole or run.message is not None and learnt[run.message] for run in runs for _ in run.ids]
    return Encoded(ids, labels, cut)


def shortened(dialog: Dialog, learnt: list[bool], template: Template, encoder: Encoder, rules: Rules) -> Encoded | None:
    """The dialog with whole turns left out, or its last answer cut; None where not one token of that has room."""
    stop = max(i for i, yes in enumerate(learnt) if yes) + 1
    roles = [m.role for m in dialog.messages]
    head = [i for i in range(stop - 1) if roles[: i + 1] == ["system"] * (i + 1)]
    begins = [i for i in range(len(head), stop) if i == len(head) or roles[i] == "user" and roles[i - 1] != "user"]

    def from_turn(k: int) -> list[Run]:
        return word(dialog, [*head, *range(begins[k], stop)], learnt, template, encoder, rules)

    def room_left(k: int) -> int:
        return rules.max_seq_len - sum(len(run.ids) for run in from_turn(k))

    first = bisect_left(range(len(begins)), 0, key=lambda k: 0 if room_left(k) >= 0 else -1)
    k = min(first, len(begins) - 1)
    runs, kept = from_turn(k), [learnt[i] for i in [*head, *range(begins[k], stop)]]
    if first == len(begins):
        found = cut_answer(runs, len(kept) - 1, rules.max_seq_len, encoder.tokenizer)
        if found is None:
            return None
        runs = found
    return flat(runs, kept, rules, cut=True)


def cut_answer(runs: list[Run], message: int, limit: int, tokenizer: Tokenizer) -> list[Run] | None:
    """The runs with fewer tokens of the message's words, so that they are at most `limit`."""
    places = [i for i, run in enumerate(runs) if run.message == message and not run.end]
    if not places:
        return None
    at = places[-1]
    ids = runs[at].ids
    room = len(ids) - (sum(len(run.ids) for run in runs) - limit)
    kept = whole_characters(tokenizer, ids, room) if room > 0 else []
    return [*runs[:at], runs[at]._replace(ids=kept), *runs[at + 1 :]] if kept else None


def whole_characters(tokenizer: Tokenizer, ids: list[int], count: int) -> list[int]:
    """The first `count` ids, or up to three fewer where they would end inside a character."""
    if "\ufffd" in tokenizer.decode(ids):
        return ids[:count]
    for n in range(count, max(count - 4, 0), -1):
        if not tokenizer.decode(ids[:n]).endswith("\ufffd"):
            return ids[:n]
    return []


def padded(encoded: Encoded, tokenizer: Tokenizer, length: int) -> Encoded:
    """Cut or filled with EOS to exactly `length`, everything learnt: what a fixed-length collator without -100 does."""
    assert tokenizer.eos_id is not None
    ids = (encoded.ids + [tokenizer.eos_id] * length)[:length]
    return Encoded(ids, [True] * length, len(encoded.ids) > length)
