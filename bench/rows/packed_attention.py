"""Causal attention over ten documents in 2048 tokens, forward and backward; on a GPU over forty in 8192, beside what torch has
for it. Program: bench/sides/packed_attention.py."""

from bench.rows import OURS, Goal, Row, Side, wants_gpu

LENGTHS = [410, 96, 305, 57, 240, 188, 333, 121, 75, 223]
SHAPE = {"lengths": LENGTHS, "heads": 8, "kv_heads": 8, "head_dim": 64, "layers": 4, "dtype": "fp32", "units": 5}
assert sum(LENGTHS) == 2048


GPU_SHAPE = {
    "lengths": LENGTHS * 4,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "layers": 4,
    "dtype": "bf16",
    "units": 20,
}
BACKENDS = ("varlen", "flex", "one by one")


def sides(ways: dict[str, str], shape: dict) -> list[Side]:
    names = {way: way.replace(" ", "_") for way in ways}
    return [
        Side(names[way], env, "packed_attention", shape | {"way": way}, names[way], shape["dtype"])
        for way, env in ways.items()
    ]


def prepare(directory, device: str) -> dict:
    return {}


def prepare_gpu(directory, device: str) -> dict:
    wants_gpu(device)
    return {}


ROWS = [
    Row(
        "packed_attention",
        "causal attention over 10 documents in 2048 tokens, 8 heads of 64, forward and backward, fp32",
        sides({"ours": OURS, "block mask": OURS, "transformers": "hf"}, SHAPE),
        [Goal("block_mask", "speed", at_least=5.0), Goal("transformers", "speed", at_least=5.0)],
        prepare,
    ),
    Row(
        "packed_attention_gpu",
        "causal attention over 40 documents in 8192 tokens, 32 heads of 128, forward and backward, bf16",
        sides({"ours": OURS} | dict.fromkeys(BACKENDS, OURS), GPU_SHAPE),
        [Goal(way.replace(" ", "_"), "speed", at_least=0.98) for way in BACKENDS],
        prepare_gpu,
    ),
]
