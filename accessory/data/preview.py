"""What a model will see and learn, for a person to read: examples in words, what is learnt in colour.

Test: pytest tests/unit/test_mixtures.py
"""

from itertools import groupby

from ..tokenizer import Tokenizer
from .loader import parts
from .sft import Example, SFTDataset

LEARNT, RESET = "\033[32m", "\033[0m"


def preview(dataset: SFTDataset, tokenizer: Tokenizer, n: int, colour: bool = True) -> str:
    """The first n items; colour: learnt text in green, else between » and «. Control characters are written out, so that
    a record cannot steer the terminal."""
    marks = (LEARNT, RESET) if colour else ("»", "«")
    lines = []
    for i in range(min(n, len(dataset))):
        for k, example in enumerate(parts(dataset[i])):
            part = f".{k + 1}" if dataset.packs is not None else ""
            learnt = int(example.learnt().sum())
            lines += [
                f"--- example {i + 1}{part}: {len(example.ids)} tokens, {learnt} learnt",
                shown(example, tokenizer, marks),
            ]
    return "\n".join(lines)


def shown(example: Example, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    text, stop, ids = "", 0, example.ids.tolist()
    before = ""
    for learnt, run in groupby(example.learnt().tolist()):
        stop += len(list(run))
        whole = tokenizer.decode_with_specials(ids[:stop])
        new = visible(whole[len(before) :])
        text, before = text + (new.join(marks) if learnt else new), whole
    return text


def visible(text: str) -> str:
    """Control and direction characters as escapes; line ends and tabs stay."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or c == "\u3000" else c.encode("unicode_escape").decode() for c in text
    )
