"""Two ranks on one machine: model parallel beside torch's DTensor, data parallel beside fully_shard of transformers' model; and
the bytes sent beside the formula. Program: bench/sides/ranks.py.

--threads 1 gives each rank one thread, and compares the CPU time of both together."""

import json

from bench.rows import OURS, Goal, Row, Side

SIZES = {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 1408, "vocab_size": 8192}
SIZES |= {"norm_eps": 1e-5, "rope_theta": 10000.0}
SHAPE = {"world": 2, "batch": 2, "length": 256, "units": 4}


def prepare(directory, device: str) -> dict:
    return small_model(directory, SIZES)


def small_model(directory, sizes: dict) -> dict:
    """Random fp32 weights as consolidated.00.pth and for transformers."""
    from bench.rows.loading import run

    (directory / "sizes.json").write_text(json.dumps(sizes))
    run("random_checkpoint", llama_config=directory / "sizes.json", dst=directory / "meta", dtype="fp32")
    run("meta_to_hf", src=directory / "meta", dst=directory / "hf")
    return {"model": str(directory / "meta"), "hf": str(directory / "hf"), "vocab": sizes["vocab_size"]}


def row(name: str, what: str, ours: str, peers: dict[str, tuple[str, str]], goals: list[Goal]) -> Row:
    ways = {ours: (OURS, OURS)} | peers
    sides = [
        Side(way + end, env, "ranks", SHAPE | {"way": way, "compile": bool(end)}, peer)
        for way, (env, peer) in ways.items()
        for end in ("", "_compile")
    ]
    return Row(name, what, sides, goals, prepare)


ROWS = [
    row(
        "ranks_mp", "one model over two ranks, fp32", "ours_mp",
        {"dtensor": (OURS, "dtensor"), "dtensor_sequence": (OURS, "dtensor")},
        [Goal("dtensor", "speed", at_least=1.1), Goal("dtensor", "sent_mb", at_most=1.01)],
    ),
    row(  # ours_dp_gloo: what our own gather and reduce-scatter are worth
        "ranks_dp", "two ranks, FSDP2, fp32", "ours_dp",
        {"hf_fully_shard": ("hf", "hf_fully_shard"), "ours_dp_gloo": (OURS, "gloo")},
        [
            Goal("hf_fully_shard", "speed", at_least=1.1),
            Goal("hf_fully_shard", "sent_mb", at_most=1.01),
            Goal("gloo", "speed", at_least=1.0),
        ],
    ),
]  # fmt: skip
