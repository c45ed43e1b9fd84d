"""Examples of any length into packs of at most so many tokens: best fit, the longest first.

    lengths [5, 2, 4, 3, 1], capacity 6  ->  [[0, 4], [1, 2], [3]]       5+1, 2+4, 3

Each example goes into the fullest pack that still has room for it; of equally full ones, the one begun first. Best fit
decreasing never takes more than 11/9 of the fewest packs possible, plus one (Johnson 1974). Tokens are not moved between
examples: a pack's are sequences with positions and attention of their own. Test: pytest tests/unit/test_packing.py
"""

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """-> packs of indices, each once, ascending in a pack, packs by their first. A function of its arguments alone.

    No length may be above `capacity`. Takes n log n time: an integer's bits say which rooms there are."""
    assert not len(lengths) or max(lengths) <= capacity, (max(lengths), capacity)
    packs: list[list[int]] = []
    with_room: dict[int, deque[int]] = defaultdict(deque)  # tokens left -> packs
    rooms = 0  # bit r: some pack has exactly r tokens left
    for i in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[i])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            pack = with_room[room].popleft()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return sorted(map(sorted, packs))
