"""How full packs are, and how full they could be: `python -m bench.packing --data_config gsm8k.jsonl --tokenizer_path FILE`

Two bounds on the packs that any packing takes: all tokens / --max_seq_len, and the linear programme over all packs that can
be made of the lengths (Gilmore and Gomory 1961), with parts of packs allowed. Its prices, one a length, are lowered until no
pack is worth more than 1, so the bound holds at whatever step it is stopped. About half a minute. The last lines: which share of
the tokens the layers are spared where what prompts of a micro batch begin with alike is there once (accessory/data/sharing.py).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from accessory import config
from accessory.config import flag
from accessory.data.loader import num_tokens, order, parts
from accessory.data.packing import best_fit, packs_of
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.data.sharing import shared
from accessory.tokenizer import Tokenizer

STEPS = 6000


@dataclass
class BenchArgs:
    """Measurement"""

    tokenizer_path: str = flag("", "tokenizer.model or tokenizer.json")


def most_valuable(sizes: np.ndarray, prices: np.ndarray, capacity: int) -> tuple[float, np.ndarray]:
    """(worth, how many of each size) of the pack that is worth most, each size as often as wanted."""
    worth, last = np.zeros(capacity + 1), np.full(capacity + 1, -1)
    for room in range(int(sizes[0]), capacity + 1):
        fitting = np.searchsorted(sizes, room, side="right")
        found = prices[:fitting] + worth[room - sizes[:fitting]]
        best = int(found.argmax())
        worth[room], last[room] = (
            (found[best], best) if found[best] > worth[room - 1] + 1e-12 else (worth[room - 1], -1)
        )
    counts, room = np.zeros(len(sizes)), capacity
    while room > 0:
        counts[last[room]] += last[room] >= 0
        room -= sizes[last[room]] if last[room] >= 0 else 1
    return float(worth[capacity]), counts


def fewest(lengths: list[int], capacity: int) -> int:
    """No packing takes fewer packs. By the simplex method, a column at a time."""
    sizes, times = map(np.array, zip(*sorted(Counter(lengths).items())))
    needed = times + np.random.default_rng(0).random(len(sizes)) * 1e-4  # no two steps alike: it would stand still
    inverse, bound = np.diag(1.0 / (capacity // sizes)), 0.0
    chosen = inverse @ needed
    for _ in range(STEPS):
        prices = np.maximum(inverse.sum(0), 0)
        worth, counts = most_valuable(sizes, prices, capacity)
        bound = max(bound, float(prices @ times) / max(worth, 1.0))
        if worth <= 1 + 1e-7:
            break
        column = inverse @ counts
        steps = np.where(column > 1e-9, chosen / np.where(column > 1e-9, column, 1), np.inf)
        out = int(steps.argmin())
        chosen, row = chosen - steps[out] * column, inverse[out] / column[out]
        inverse, chosen[out] = inverse - np.outer(column, row), steps[out]
        inverse[out] = row
    return int(np.ceil(bound - 1e-3))


def main(bench: BenchArgs, data: DataArgs) -> None:
    train, _ = load_sft(data, Tokenizer.open(bench.tokenizer_path), 0)
    lengths, capacity = [len(train.at(i).ids) for i in range(len(train.order))], data.max_seq_len
    total = sum(lengths)
    rows = {"best fit": len(best_fit(lengths, capacity)), "as packed": len(packs_of(lengths, capacity))}
    rows |= {"no packing has fewer": fewest(lengths, capacity), "tokens / length": -(-total // capacity)}
    print(f"{len(lengths)} examples of {min(lengths)} to {max(lengths)} tokens, {total} in all, packs of {capacity}")
    for name, packs in rows.items():
        print(f"{name:<22}{packs:>8} packs{total / capacity / packs:>9.2%} full")
    for size in (2, 4, 8, 16, 32):
        print(
            f"micro batches of {size:<5}{spared(train, size):>8.1%} of the tokens are spared, prompts that begin alike shared"
        )


def spared(train: SFTDataset, batch_size: int) -> float:
    """The share of the first epoch's tokens that layers do not see twice, items of the data set taken so many at a time."""
    saved = tokens = 0
    places = order(train, 0, 0)
    for first in range(0, len(places), batch_size):
        examples = [e for place in places[first : first + batch_size] for e in parts(train[int(place)])]
        tokens += num_tokens(examples)
        saved += num_tokens(examples) - num_tokens(shared(examples)[0])
    return saved / tokens


if __name__ == "__main__":
    config.run(main, BenchArgs, DataArgs, doc=__doc__)
