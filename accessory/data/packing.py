"""Examples of any length into packs of at most so many tokens: best fit, the longest first, then single ones change places.

    lengths [5, 2, 4, 3, 1], capacity 6  ->  [[0, 4], [1, 2], [3]]       5+1, 2+4, 3

best_fit   each example goes into the fullest pack that still has room for it; of equally full ones, the one begun first.
           Best fit decreasing never takes more than 11/9 of the fewest packs possible, plus one (Johnson 1974)
tightened  a pack takes an example out of an emptier one, or gives a shorter one for it, as long as that makes the fuller of
           the two fuller still. The room that is left comes together in few packs, and some of them run empty

    capacity 10   [6, 3]  [5, 4]  [2]   4 for 3 ->   [6, 4]  [5, 3]  [2]   takes 2 ->   [6, 4]  [5, 3, 2]

Best fit alone leaves pairs of examples just under half of the capacity, with a room beside them that is too small for any
other. Tokens are not moved between examples: a pack's are sequences with positions and attention of their own.
Test: pytest tests/unit/test_packing.py
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np


def packs_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """-> packs of indices, each once, ascending in a pack, packs by their first. A function of its arguments alone: whole
    numbers only, so alike on every machine. Never more packs than best fit. No length may be above `capacity`."""
    return tightened(best_fit(lengths, capacity), lengths, capacity)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As `packs_of`, by best fit decreasing alone. Takes n log n time: an integer's bits say which rooms there are."""
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


def tightened(packs: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same examples in as many packs or fewer. Ends: every change makes the sum of the packs' squares larger."""
    work = Tightening([list(pack) for pack in packs], np.asarray(lengths, np.int64).tolist(), capacity)
    todo = [(room, p) for p, room in enumerate(work.room) if room]
    heapify(todo)  # the fullest first
    while todo:
        room, p = heappop(todo)
        if room == work.room[p] and work.packs[p]:
            for changed in work.fill(p):
                if work.room[changed] and work.packs[changed]:
                    heappush(todo, (work.room[changed], changed))
    return sorted(sorted(pack) for pack in work.packs if pack)


class Tightening:
    """Packs that still change. `holders[length]` is a heap of (-room, pack): the emptiest pack with such an example is on
    top. Entries that are true no longer are passed over when they come up."""

    def __init__(self, packs: list[list[int]], lengths: list[int], capacity: int):
        self.packs, self.lengths = packs, lengths
        self.room = [capacity - sum(lengths[i] for i in pack) for pack in packs]
        self.holders: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for p in range(len(packs)):
            self.enter(p)

    def enter(self, p: int) -> None:
        for length in {self.lengths[i] for i in self.packs[p]} if self.room[p] else ():
            heappush(self.holders[length], (-self.room[p], p))

    def fill(self, p: int) -> tuple[int, ...]:
        """Makes pack p as full as one example, taken or exchanged, can make it; the packs that changed."""
        own = {self.lengths[i]: i for i in self.packs[p]}
        for gain in range(self.room[p], 0, -1):
            for mine in (0, *sorted(own)):
                q = self.emptiest(mine + gain, p)
                if q is not None and self.room[q] > self.room[p] - gain:
                    self.exchange(p, own.get(mine), q, mine + gain)
                    return p, q
        self.enter(p)
        return ()

    def emptiest(self, length: int, but: int) -> int | None:
        """The pack with most room of those, all but one, that hold an example of this length."""
        heap = self.holders.get(length)
        while heap:
            room, q = -heap[0][0], heap[0][1]
            if q != but and room == self.room[q] and any(self.lengths[i] == length for i in self.packs[q]):
                return q
            heappop(heap)
        return None

    def exchange(self, p: int, mine: int | None, q: int, length: int) -> None:
        """Pack p gets an example of that length from pack q, and gives `mine` for it, if any."""
        theirs = next(i for i in self.packs[q] if self.lengths[i] == length)
        for giver, taker, i in ((q, p, theirs), (p, q, mine)):
            if i is not None:
                self.packs[giver].remove(i)
                self.packs[taker].append(i)
                self.room[giver] += self.lengths[i]
                self.room[taker] -= self.lengths[i]
        self.enter(p)
        self.enter(q)
