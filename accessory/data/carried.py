"""The template that a checkpoint carries: what its run's data were worded with, so that it is asked in the same words.

    template.json   {"template": "chatml", "sequences": {"chatml": 900, "alpaca": 100}}
                    {"template": "checkpoint", "chat_template": "{% for m in ...", "template_date": "2024-07-26", "sequences": ...}

`sequences` counts an epoch's by template; the one that most of them have is carried. Of a Jinja template the text is kept,
and the date that it was told. The file lies beside the tokenizer, and goes where the tokenizer is copied to; a Jinja text is
also written as chat_template.jinja, where transformers looks for it.

Asked with:  --template  >  what the checkpoint carries, or the training data of a run had  >  Alpaca's
Test: pytest tests/unit/test_generate_template.py
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..tokenizer import Tokenizer
from .chat_template import FILE as JINJA_FILE
from .chat_template import ChatTemplate
from .dialog import Template
from .templates import NAMED, Named, open_template

FILE = "template.json"
DEFAULT = "alpaca"


def most_used(templates: Iterable[Template]) -> dict[str, Any]:
    """What template.json says of sequences with these templates. Of equally many, the first."""
    times: Counter[str] = Counter()
    first: dict[str, Template] = {}
    for template, count in Counter(templates).items():
        times[template.name] += count
        first.setdefault(template.name, template)
    (name, _), *_ = times.most_common()
    chosen, record = first[name], {"template": name, "sequences": dict(times)}
    if isinstance(chosen, ChatTemplate):
        record |= {"chat_template": chosen.source, "template_date": chosen.today.strftime("%Y-%m-%d")}
    return record


def line(record: dict[str, Any]) -> str:
    """For the log of a run."""
    name, times = record["template"], record["sequences"]
    others = ", ".join(f"{other} {count}" for other, count in times.items() if other != name)
    most = f", of {times[name]} of {sum(times.values())} sequences (beside it {others})" if others else ""
    return f"template: {name}{most}; checkpoints carry it in {FILE}"


def write(record: dict[str, Any], directory: Path) -> None:
    """template.json, and a Jinja template's own file."""
    (directory / FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if "chat_template" in record:
        (directory / JINJA_FILE).write_text(record["chat_template"], encoding="utf-8")


def find(parts: Sequence[Path]) -> Path | None:
    """The template.json of a checkpoint laid together of these parts: the last one's that has any."""
    files = [(part if part.is_dir() else part.parent) / FILE for part in reversed(parts)]
    return next((file for file in files if file.is_file()), None)


def read(file: Path) -> dict[str, Any]:
    """ValueError names the file where it is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        texts = [record["template"], record.get("chat_template", ""), record.get("template_date", "")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{file}: not {{"template": name, ...}}: remove it, and choose with --template')
    return record


def asked_with(tokenizer: Tokenizer, flag: str | None, date: str, record: dict[str, Any] | None) -> Template:
    """The template of a question: --template, else the record's, else Alpaca's. ValueError says what it lacks."""
    if flag is not None or record is None:
        return open_template(flag or DEFAULT, tokenizer, date=date)
    name = record["template"]
    if "chat_template" in record:
        return ChatTemplate(record["chat_template"], tokenizer, name, record.get("template_date", ""))
    if name not in NAMED:
        raise ValueError(
            f"{FILE}: template {name!r} is not known here: choose one with --template ({', '.join(NAMED)})"
        )
    return Named(name, tokenizer)
