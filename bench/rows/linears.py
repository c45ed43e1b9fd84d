"""A layer's seven linears of a 7B on a GPU, forward and backward: the parallel ones on one rank beside nn.Linear. Program:
bench/sides/linears.py."""

from bench import workload
from bench.rows import OURS, Goal, Row, Side, wants_gpu

TOKENS = 8192
SHAPE = {
    "dim": workload.LLAMA_7B["dim"],
    "ffn": workload.LLAMA_7B["hidden_dim"],
    "tokens": TOKENS,
    "dtype": "bf16",
    "units": 20,
}


def prepare(directory, device: str) -> dict:
    wants_gpu(device)
    dim, ffn = SHAPE["dim"], SHAPE["ffn"]
    return {"gemms": [(TOKENS, dim, dim), (TOKENS, dim, ffn)], "flops_per_token": 6 * (4 * dim * dim + 3 * dim * ffn)}


ROW = Row(
    "linears_gpu",
    f"a layer's seven linears of a 7B, {TOKENS} tokens, forward and backward, bf16",
    [Side(way, OURS, "linears", SHAPE | {"way": way}, precision="bf16") for way in ("ours", "plain")],
    [Goal("plain", "speed", at_least=0.995)],
    prepare,
)
