"""Head and cross-entropy, forward and backward, 35 % of the rows without a label: at vocabularies of 32 and 128 thousand, in
bf16 and fp32. Program: bench/sides/head.py."""

from bench.rows import OURS, Goal, Row, Side

ROWS_OF = {32000: 2048, 128256: 1024}
PEERS = {
    "eager": "eager",
    "compiled": "compiled",
    "torch auto": "torch",
    "torch 256": "torch",
    "cut_cross_entropy": "cce",
}


def sides(vocab: int, dtype: str) -> list[Side]:
    shape = {"vocab": vocab, "dtype": dtype, "rows": ROWS_OF[vocab], "dim": 512, "ignored": 0.35, "units": 2}
    ways = {"ours": OURS} | PEERS
    return [
        Side(w.replace(" ", "_"), "cce" if p == "cce" else OURS, "head", shape | {"way": w}, p, dtype)
        for w, p in ways.items()
    ]


def row(vocab: int, dtype: str) -> Row:
    goals = [Goal(p, "speed", at_least=1.0) for p in dict.fromkeys(PEERS.values())]
    goals.append(Goal("eager", "extra_mb", at_most=0.15))
    what = f"head and loss, forward and backward, V {vocab}, {dtype}, {ROWS_OF[vocab]} x 512, 35 % ignored"
    supervised = round(ROWS_OF[vocab] * 0.65)

    def prepare(directory, device: str) -> dict:
        return {"gemms": [(supervised, 512, vocab)], "flops_per_token": 6 * 512 * vocab * 0.65}

    return Row(f"head_loss_{vocab // 1000}k_{dtype}", what, sides(vocab, dtype), goals, prepare)


ROWS = [row(vocab, dtype) for vocab in ROWS_OF for dtype in ("bf16", "fp32")]
