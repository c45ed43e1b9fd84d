"""Causal attention over ten documents in 2048 tokens, forward and backward. Program: bench/sides/packed_attention.py."""

from bench.rows import OURS, Goal, Row, Side

LENGTHS = [410, 96, 305, 57, 240, 188, 333, 121, 75, 223]
SHAPE = {"lengths": LENGTHS, "heads": 8, "kv_heads": 8, "head_dim": 64, "layers": 4, "dtype": "fp32", "units": 5}
assert sum(LENGTHS) == 2048


def sides() -> list[Side]:
    ways = {"ours": OURS, "block mask": OURS, "transformers": "hf"}
    return [
        Side(way.replace(" ", "_"), env, "packed_attention", SHAPE | {"way": way}, way.replace(" ", "_"))
        for way, env in ways.items()
    ]


def prepare(directory, device: str) -> dict:
    return {}


ROW = Row(
    "packed_attention",
    "causal attention over 10 documents in 2048 tokens, 8 heads of 64, forward and backward, fp32",
    sides(),
    [Goal("block_mask", "speed", at_least=5.0), Goal("transformers", "speed", at_least=5.0)],
    prepare,
)
