"""A checkpoint's chat_template (Jinja) as a template: pieces, labels, and no harm from a hostile one.

    messages --contents guarded--> Jinja, sandboxed --> text with marks --cut at special tokens and marks--> pieces

Special tokens count where the template wrote them. One that a content spells gets a private character inside before
rendering, which comes out again after the text is cut, so it stays ordinary characters; contents are otherwise what the
template sees, so its own trimming and tests give what transformers' apply_chat_template gives.

An answer's bounds are {% generation %} blocks where the template has them. Else they are found by rendering: up to the
answer with add_generation_prompt, up to and with it, and all. Each must begin like the next; a template that rewrites
earlier turns is refused. White space after an answer's last special token is not learnt.

Hostile templates: Jinja's immutable sandbox; named filters and string methods only; steps, sizes and seconds are counted
(limited.py). `strftime_now` tells a fixed date, so that the data do not change overnight: --template_date.
Test: pytest tests/unit/test_chat_template.py
"""

import json
import re
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

from ..tokenizer import Tokenizer
from . import limited
from .dialog import Message, Piece

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_SOURCE = 2**18  # characters; the longest published ones have about 30,000
DATE = "2024-07-26"  # Llama 3.1's own
PRIVATE = [chr(i) for i in range(0x100000, 0x100040)]


def beside(path: Path) -> str | None:
    """The template that lies beside a tokenizer; of a file that is one, or holds one, its text. None: there is none."""
    file = path if path.suffix in (".jinja", ".jinja2") else path.with_name(FILE)
    if file.is_file():
        return read_text(file)
    config = path if path.suffix == ".json" and path.name != "tokenizer.json" else path.with_name(CONFIG)
    if not config.is_file():
        return None
    try:
        content = json.loads(read_text(config))
        found = content.get("chat_template")
        if isinstance(found, list):  # several by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{config}: no JSON object with a chat_template: repair or remove it") from None
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{config}: chat_template is not text: repair or remove it")
    return found


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8: save it as UTF-8, or name another --template") from None


class ChatTemplate:
    """A Jinja chat template for one tokenizer. Safe to use from several threads."""

    tokenize = "joint"

    def __init__(self, source: str, tokenizer: Tokenizer, name: str, date: str = ""):
        if not source.strip() or len(source) > MAX_SOURCE:
            raise ValueError(f"--template {name}: {len(source):,} characters: expected a chat template")
        self.source, self.tokenizer, self.name = source, tokenizer, name
        try:
            self.today = datetime.strptime(date or DATE, "%Y-%m-%d")
        except ValueError:
            raise ValueError(f"--template_date {date}: write it as 2024-07-26") from None
        self.template = limited.Template(source, f"--template {name}", {"strftime_now": limited.clock(self.today)})
        self.names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        by_id = {i: token for token, i in tokenizer.special_tokens.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self.variables = {key: by_id[i] for key, i in ids.items() if i in by_id}
        self.variables |= {"unk_token": "<unk>"} if "<unk>" in tokenizer.special_tokens else {}
        self.marks_answers = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    @cached_property
    def _parts(self) -> tuple[set[str], set[str]]:
        """How a special token may begin, and how it may end, short of the whole."""
        places = [(name, n) for name in self.names for n in range(1, len(name))]
        return {name[:n] for name, n in places}, {name[n:] for name, n in places}

    def render(self, messages: Sequence[Message], prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        """What the template writes; marks: put around every {% generation %} block. ValueError in the template's name."""
        chat = [{"role": m.role, "content": m.words} for m in messages]
        options = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": prompt}
        return self.template.render(self.variables | options, marks)

    def pieces(self, messages: Sequence[Message], learnt: Collection[int] = (), prompt: bool = False) -> list[Piece]:
        """ValueError where it rewrites earlier turns, fails, or `learnt` names what is no answer."""
        for i in learnt:
            if messages[i].role != "assistant":
                raise ValueError(
                    f"message {i + 1} ({messages[i].role}) is to be learnt, and --template {self.name} tells the bounds "
                    "of answers only: choose a named template"
                )
        guard, start, stop = self._private(messages)
        guarded = [m._replace(text=self._guard(m.words, guard), input="") for m in messages]
        if learnt and self.marks_answers:
            marked = self.render(guarded, prompt, (start, stop))
            text, bounds = self._marked_bounds(marked, messages, (start, stop))
        else:
            text = self.render(guarded, prompt)
            bounds = {i: self._bounds(guarded, i, text) for i in learnt}
        pieces, at = [], 0
        for i, (a, b) in sorted(bounds.items()):
            pieces += [*self._cut(text[at:a], None, guard), *self._cut(text[a:b], i, guard)]
            at = b
        return [*pieces, *self._cut(text[at:], None, guard)]

    def _private(self, messages: Sequence[Message]) -> list[str]:
        """Three characters that stand nowhere in the dialog."""
        there = set().union(self.source, *(m.words for m in messages))
        free = [c for c in PRIVATE if c not in there][:3]
        if len(free) < 3:
            raise ValueError("it uses all of the characters U+100000 to U+10003F: remove them")
        return free

    def _guard(self, text: str, guard: str) -> str:
        """`text` with `guard` inside every special token that it spells, or that it could begin or complete at its ends."""
        text = self._special.sub(lambda m: m[0][0] + guard + m[0][1:], text)
        body = text.strip()
        before = len(text) - len(text.lstrip())
        heads, tails = self._parts
        longest = range(1, min(len(body), max(map(len, self.names), default=0)) + 1)
        if any(body[-n:] in heads for n in longest):
            text = text[: before + len(body)] + guard + text[before + len(body) :]
        if any(body[:n] in tails for n in longest):
            text = text[:before] + guard + text[before:]
        return text

    def _bounds(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int]:
        """Where answer i begins and ends in the rendered dialog."""
        head = self.render(messages[:i], prompt=True)
        answered = self.render(messages[: i + 1])
        if not (answered.startswith(head) and whole.startswith(answered)):
            raise ValueError(
                f"--template {self.name} writes the first {i + 1} messages in another way when more follow: use "
                "--train_on last, a named template, or one with {% generation %}"
            )
        return len(head), len(head) + self._end_of(answered[len(head) :])

    def _end_of(self, answer: str) -> int:
        """The answer's length without white space after its last special token."""
        last = max((m.end() for m in self._special.finditer(answer)), default=len(answer))
        return last if not answer[last:].strip() else len(answer)

    def _marked_bounds(
        self, marked: str, messages: Sequence[Message], marks: tuple[str, str]
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text without marks, and the block of each answer in it."""
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        parts = re.split("([" + "".join(marks) + "])", marked)
        if parts[1::2] != list(marks) * len(answers):
            raise ValueError(
                f"--template {self.name} has {len(parts) // 4} {{% generation %}} blocks for {len(answers)} answers: use a "
                "named template"
            )
        edges = [sum(len(p) for p in parts[: i + 1 : 2]) for i in range(0, len(parts) - 1, 2)]
        return "".join(parts[::2]), dict(zip(answers, zip(edges[::2], edges[1::2])))

    def _cut(self, text: str, message: int | None, guard: str) -> list[Piece]:
        """A stretch of rendered text as pieces: special tokens as ids, the rest as characters, unguarded."""
        found, at = [], 0
        for m in self._special.finditer(text):
            found += [(text[at : m.start()], False), (m[0], True)]
            at = m.end()
        found.append((text[at:], False))
        tail = [special for _, special in found].count(True)
        pieces = []
        for part, special in found:
            tail -= special
            end = special and not tail and not text[at:].strip()
            content = self.tokenizer.special_tokens[part] if special else part.replace(guard, "")
            pieces += [Piece(content, message, end=message is not None and end)] if content != "" else []
        return pieces
