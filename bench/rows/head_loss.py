"""Head and cross-entropy, forward and backward, 35 % of the rows without a label: at vocabularies of 32 and 128 thousand, in
bf16 and fp32; on a GPU at the width of a 7B, trained and frozen. Program: bench/sides/head.py."""

from typing import Any

from bench.rows import OURS, Goal, Row, Side, wants_gpu

ROWS_OF = {32000: 2048, 128256: 1024}
PEERS = {
    "eager": "eager",
    "compiled": "compiled",
    "torch auto": "torch",
    "torch 256": "torch",
    "cut_cross_entropy": "cce",
}
ENVS = {"cce": "cce", "liger": "liger"}
IGNORED = 0.35


def sides(peers: dict[str, str], **shape: Any) -> list[Side]:
    """`peers`: of each way, what goals call it."""
    shape |= {"ignored": IGNORED, "units": 2}
    return [
        Side(w.replace(" ", "_"), ENVS.get(p, OURS), "head", shape | {"way": w}, p, shape["dtype"])
        for w, p in ({"ours": OURS} | peers).items()
    ]


def prepared(rows: int, dim: int, vocab: int, trained: bool) -> dict:
    learnt = 1 - IGNORED
    return {
        "gemms": [(round(rows * learnt), dim, vocab)],
        "flops_per_token": (6 if trained else 4) * dim * vocab * learnt,
    }


def row(vocab: int, dtype: str) -> Row:
    goals = [Goal(p, "speed", at_least=1.0) for p in dict.fromkeys(PEERS.values())]
    goals.append(Goal("eager", "extra_mb", at_most=0.15))
    what = f"head and loss, forward and backward, V {vocab}, {dtype}, {ROWS_OF[vocab]} x 512, 35 % ignored"

    def prepare(directory, device: str) -> dict:
        return prepared(ROWS_OF[vocab], 512, vocab, True)

    shape = {"vocab": vocab, "dtype": dtype, "rows": ROWS_OF[vocab], "dim": 512}
    return Row(f"head_loss_{vocab // 1000}k_{dtype}", what, sides(PEERS, **shape), goals, prepare)


def gpu_row(vocab: int, trained: bool) -> Row:
    """Memory is all that is there at the peak, inputs and gradients too."""
    peers = PEERS | {"liger": "liger"}
    goals = [Goal(p, "speed", at_least=1.0) for p in dict.fromkeys(peers.values())]
    goals.append(Goal("liger", "peak_mb", at_most=1.1))
    kind = "trained" if trained else "frozen"
    what = f"head and loss on a GPU, forward and backward, V {vocab}, {kind}, bf16, 8192 x 4096, 35 % ignored"

    def prepare(directory, device: str) -> dict:
        wants_gpu(device)
        return prepared(8192, 4096, vocab, trained)

    shape = {"vocab": vocab, "dtype": "bf16", "rows": 8192, "dim": 4096, "trained": trained}
    return Row(f"head_loss_gpu_{vocab // 1000}k_{kind}", what, sides(peers, **shape), goals, prepare)


ROWS = [row(vocab, dtype) for vocab in ROWS_OF for dtype in ("bf16", "fp32")]
ROWS += [gpu_row(vocab, trained) for vocab in ROWS_OF for trained in (True, False)]
