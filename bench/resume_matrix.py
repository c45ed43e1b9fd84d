"""Every layout of four ranks or fewer, resumed on every other one:  python -m bench.resume_matrix

    {1x1, 2x1, 1x2, 2x2, 4x1, 1x4} (mp x dp) -> each of them; full tuning, tied and untied, and LoRA; 2 kv heads (at mp 4
    there are copies), 101 rows of vocabulary (no mp divides it); saved after 3 steps, 10 more compared with the unbroken run

One table for each kind of run: the worst relative difference of the loss over the 10 steps. Checked besides: the sample ids
of every step are equal, and on the same layout losses, weights and moments are bit-equal. About 10 minutes on two cores.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.dist import runs
from tests.dist.test_any_layout import LAYOUTS, SAVED_AT, apart, case_of, continued, unbroken
from tests.helpers import close_pool, run_ranks

KINDS = ("full", "full, tied", "lora")
FURTHER = 10
Layout = tuple[int, int]


def name(layout: Layout) -> str:
    return f"{layout[0]}x{layout[1]}"


def matrix(kind: str, directory: Path) -> dict[tuple[Layout, Layout], float]:
    """{(then, now): the worst relative difference of the loss}. Raises AssertionError where something is not equal."""
    steps, found = SAVED_AT + FURTHER, {}
    first, paths = {}, {layout: directory / name(layout) for layout in LAYOUTS}
    for world in (1, 2, 4):
        here = [layout for layout in LAYOUTS if layout[0] * layout[1] == world]
        cases = [case_of(layout, kind) for layout in here]
        ranks = run_ranks(unbroken, cases, [paths[layout] for layout in here], steps, world=world, timeout=600)
        first |= {layout: [of_rank[i] for of_rank in ranks] for i, layout in enumerate(here)}
    for now in LAYOUTS:
        pairs = [(case_of(now, kind), paths[then]) for then in LAYOUTS]
        ranks = run_ranks(continued, pairs, steps, world=now[0] * now[1], timeout=600)
        for i, then in enumerate(LAYOUTS):
            again = [of_rank[i] for of_rank in ranks]
            assert again[0]["ids"] == first[then][0]["ids"], (kind, then, now)
            found[then, now] = apart(first[then][0]["lines"], again[0]["lines"], "loss")
            if then == now:
                assert found[then, now] == 0, (kind, then)
                wrong = [runs.differ(a["contents"], b["contents"]) for a, b in zip(first[then], again)]
                assert not any(wrong), (kind, then, wrong)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for kind in KINDS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            found = matrix(kind, Path(directory))
        print(f"\n{kind}: worst relative difference of the loss, saved at (row), resumed at (column), mp x dp")
        print("      " + "".join(f"{name(layout):>9}" for layout in LAYOUTS))
        for then in LAYOUTS:
            print(f"{name(then):>6}" + "".join(f"{found[then, now]:9.1e}" for now in LAYOUTS))
        worst = max(found.values())
        print(
            f"worst {worst:.1e}; {len(found)} of {len(found)} with equal sample ids; same layout bit-equal; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        assert worst <= 1e-5, worst
    close_pool()


if __name__ == "__main__":
    main()
