"""What follows backward: the norm over all gradients, the clipping, AdamW. 300 small tensors and 16 of a million numbers.

The goal is against the fused step alone, without a norm and without clipping. Program: bench/sides/adamw_step.py."""

from bench.rows import OURS, Goal, Row, Side

SHAPE = {"small": 300, "small_size": 2048, "large": 16, "large_size": 2**20, "clip": 1.0, "units": 20}
WAYS = ("ours", "ours_sharded", "fused", "fused_clip", "foreach_clip", "default_clip")


def prepare(directory, device: str) -> dict:
    return {}


ROW = Row(
    "optimizer",
    "norm, clipping and AdamW over 300 tensors of 2048 and 16 of 1M numbers (tokens: parameters)",
    [Side(way, OURS, "adamw_step", SHAPE | {"way": way}) for way in WAYS],
    [
        Goal("fused", "seconds", at_most=1.3),
        Goal("fused_clip", "seconds", at_most=1.0),
        Goal("fused", "seconds", at_most=1.3, ours="ours_sharded"),
    ],
    prepare,
)
