"""How ours grows: speed and memory against sequence length, vocabulary and LoRA rank on one rank, and bytes sent against ranks.

No peers. Programs: bench/sides/grow.py, bench/sides/ranks.py. `python -m bench.growth RESULT.json` puts the formulae beside
it and draws the curves."""

from bench.rows import OURS, Row, Side

SMALL = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 704, "vocab_size": 4096}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (32000, 64000, 128000, 256000)
LORA_RANKS = (4, 16, 64, 256)
PARALLEL = {"batch": 2, "units": 2}


def point(curve: str, x: int, length: int = 1024, lora_rank: int = 0, **sizes) -> Side:
    units = 5 if length * sizes.get("vocab_size", 1) < 2**25 else 2
    settings = {
        "curve": curve,
        "x": x,
        "sizes": SMALL | sizes,
        "length": length,
        "lora_rank": lora_rank,
        "units": units,
    }
    return Side(f"ours_{curve}_{x}", OURS, "grow", settings)


def parallel(way: str, world: int, length: int, lora_rank: int = 0) -> Side:
    curve = f"{way.removeprefix('ours_')}{'_lora' if lora_rank else ''}"
    settings = {"way": way, "curve": curve, "x": world, "world": world, "length": length, "lora_rank": lora_rank}
    return Side(f"ours_{curve}_{world}_{length}", OURS, "ranks", PARALLEL | settings)


def prepare(directory, device: str) -> dict:
    from bench.rows.ranks import small_model

    return small_model(directory, SMALL | {"norm_eps": 1e-5, "rope_theta": 10000.0}) | {"gemms": [(1024, 256, 704)]}


ROW = Row(
    "growth",
    "ours against sequence length, vocabulary, LoRA rank and ranks, 2 layers of 256, fp32",
    [
        *(point("length", n, length=n) for n in LENGTHS),
        *(point("vocabulary", v, vocab_size=v) for v in VOCABULARIES),
        *(point("lora", r, lora_rank=r) for r in LORA_RANKS),
        *(parallel(way, *at) for way in ("ours_mp", "ours_dp") for at in ((2, 128), (2, 512), (4, 512))),
        *(parallel(way, world, 512, lora_rank=16) for way in ("ours_mp", "ours_dp") for world in (2, 4)),
    ],
    [],
    prepare,
)
