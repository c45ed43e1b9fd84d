"""The examples that all sides of a training row see, in the same order. torch only: it runs in the peers' environments.

    examples.pt: {"ids": all tokens end to end, "ends": where each example ends, "prompts": how many of its tokens are not learnt}
    window i = examples [i * size, (i + 1) * size): one optimizer step; a unit is `windows_per_unit` of them

The dense rows are the same with equal lengths and prompts of 1 (nobody predicts a first token).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import measure

IGNORED = -100


def examples(data: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """(ids, prompt length) of each."""
    stored = torch.load(data["examples"], weights_only=True)
    ids = stored["ids"].tensor_split(stored["ends"][:-1])
    return list(zip(ids, stored["prompts"].tolist()))


def windows(data: dict[str, Any]) -> Iterator[list[tuple[Tensor, int]]]:
    """One optimizer step's examples after the other."""
    rows, size = examples(data), data["batch_size"]
    for first in range(0, len(rows) - size + 1, size):
        yield rows[first : first + size]


def padded(
    window: list[tuple[Tensor, int]], pad_id: int, pad_to: int | None, device: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input ids, labels aligned with them, attention mask or None where nothing is padded), each (examples, length)."""
    length = max(pad_to or 0, max(len(ids) for ids, _ in window))
    tokens = torch.full((len(window), length), pad_id)
    labels, mask = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for row, (ids, prompt) in enumerate(window):
        tokens[row, : len(ids)] = ids
        labels[row, prompt : len(ids)] = ids[prompt:]
        mask[row, : len(ids)] = 1
    moved = [t.to(device) for t in (tokens, labels, mask)]
    return moved[0], moved[1], None if mask.all() else moved[2]


def targets(window: list[tuple[Tensor, int]]) -> int:
    return sum(len(ids) - prompt for ids, prompt in window)


def tokens_per_unit(data: dict[str, Any]) -> float:
    """Real tokens, padding not counted, of the mean timed unit."""
    skip = data["warmup"] * data["windows_per_unit"] * data["batch_size"]
    timed = data["units"] * data["windows_per_unit"] * data["batch_size"]
    return sum(len(ids) for ids, _ in examples(data)[skip : skip + timed]) / data["units"]


def unit_of(
    data: dict[str, Any], step: Callable[[list[tuple[Tensor, int]]], Tensor], losses: list[Tensor]
) -> Callable[[], None]:
    """A function that does one unit: `step(window) -> mean loss` on the next windows."""
    stream = windows(data)

    def unit() -> None:
        for _ in range(data["windows_per_unit"]):
            losses.append(step(next(stream)).detach())

    return unit


def run(data: dict[str, Any], step: Callable, losses: list[Tensor], device: str, loaded: float) -> None:
    """Times a peer's training and reports it; `step` and `losses` as above, `loaded`: MB before the first step."""
    timed = measure.timed(unit_of(data, step, losses), data["warmup"], data["units"], device)
    compared = [float(x) for x in losses[: data["losses"]]]
    measure.report(loss=compared, tokens=tokens_per_unit(data), more={"loaded_mb": loaded}, **timed)
