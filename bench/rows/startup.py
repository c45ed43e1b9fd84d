"""Until a command line has said what it can do, and until a run has said what it will do. Program: bench/sides/start_up.py.

`import torch` alone (side torch) is the limit of all that import it, which ours does when a run begins."""

from bench.rows import OURS, Goal, Row, Side

HELP = {
    "ours": (OURS, ["{python}", "-m", "accessory.main_finetune", "--help"]),
    "litgpt": ("litgpt", ["{bin}/litgpt", "--help"]),
    "litgpt_finetune": ("litgpt", ["{bin}/litgpt", "finetune_lora", "--help"]),
    "torchtune": ("torchtune", ["{bin}/tune", "run", "--help"]),
    "transformers": ("hf", ["{python}", "-c", "from transformers import LlamaForCausalLM, Trainer"]),
    "torch": (OURS, ["{python}", "-c", "import torch"]),
}
DRY_RUN = [
    "{python}",
    "-m",
    "accessory.main_finetune",
    "--pretrained_path",
    "{model}",
    "--data_config",
    "{data_config}",
]
DRY_RUN += ["--output_dir", "{model}-run", "--dry_run", "true"]


def prepare(directory, device: str) -> dict:
    from tests.helpers import write_tiny_checkpoint, write_tiny_data

    write_tiny_checkpoint(directory / "model")
    write_tiny_data(directory / "data")
    return {"model": str(directory / "model"), "data_config": str(directory / "data" / "data.yaml")}


ROW = Row(
    "startup",
    "--help, and --dry_run of a tiny model (tokens: starts)",
    [
        *(Side(name, env, "start_up", {"command": words, "units": 2}) for name, (env, words) in HELP.items()),
        Side("ours_dry_run", OURS, "start_up", {"command": DRY_RUN, "units": 2}),
    ],
    [
        *(Goal(p, "seconds", at_most=0.5) for p in ("litgpt", "litgpt_finetune", "transformers")),
        Goal("torch", "seconds", at_most=0.5),
        Goal("litgpt_finetune", "seconds", at_most=1.0, ours="ours_dry_run"),
    ],
    prepare,
)
