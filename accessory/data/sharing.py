"""What prompts of a micro batch begin with alike, once: a template's words, a system message, a question with several answers.

    sequences   p p p q q a | p p p b b | p p p q q c c       of p and q nothing is learnt, nor of the token that follows
    the row     p p p | b b | q q | a | c c                   `after` -1 0 0 2 2: whose tokens come before a sequence's own

Under causal attention such tokens have the same hidden states in every sequence, so the layers need them once; their gradient
is the sum over the sequences, exactly. Attention alone sees them in each (model/sharing.py). Test: pytest tests/unit/test_sharing.py
"""

from collections.abc import Sequence

import numpy as np

from .sft import Example

LEAST = 8  # tokens: fewer in common are not worth a sequence
WORTH = (
    1 / 20
)  # of all tokens: attention copies its inputs and result, 2 % of a narrow model's time (CPU), and some memory


def shared(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """-> (the same with common beginnings as sequences of their own, each before those that come after it; `after` of each),
    or the examples as they are, where too little is alike."""
    prompts = [e.ids[: max(first_learnt(e) - 1, 0)] for e in examples]
    keys = [p.astype(">i4").tobytes() for p in prompts]  # sorts as the ids do
    order = sorted(range(len(examples)), key=keys.__getitem__)  # so that those that are alike are neighbours
    alike = np.array([common(prompts[a], prompts[b]) for a, b in zip(order, order[1:])], int)
    row: list[Example] = []
    after: list[int] = []
    # (first, end, begun, before): of order[first:end] the first `begun` tokens are in the row, up to its sequence `before`
    todo = [(0, len(order), 0, -1)]
    while todo:
        first, end, begun, before = todo.pop()
        if end - first == 1:
            row.append(without(examples[order[first]], begun))
            after.append(before)
            continue
        cut = first + int(alike[first : end - 1].argmin())
        if alike[cut] - begun >= LEAST:
            ids = examples[order[first]].ids[begun : alike[cut]]
            row.append(Example(ids, len(ids)))
            after.append(before)
            begun, before = int(alike[cut]), len(row) - 1
        todo += [(cut + 1, end, begun, before), (first, cut + 1, begun, before)]
    tokens = sum(len(e.ids) for e in examples)
    if tokens - sum(len(e.ids) for e in row) < WORTH * tokens:
        return list(examples), [-1] * len(examples)
    return row, after


def first_learnt(example: Example) -> int:
    """Where; where nothing is, its length."""
    learnt = example.learnt()
    return int(learnt.argmax()) if learnt.any() else len(learnt)


def without(example: Example, begun: int) -> Example:
    """What of it comes after its first `begun` tokens, none of which is learnt."""
    spans = None if example.spans is None else example.spans - begun
    return Example(example.ids[begun:], example.prompt_len - begun, spans)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
