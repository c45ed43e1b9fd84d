"""Whether LoRA over a base in NF4 learns what it learns over the exact one:
python -m bench.qlora_curve --pretrained_path DIR --data gsm8k_train.jsonl [--steps 40]

The same main_finetune command twice, with and without --quant nf4: same order of data, same start of the adapters. Printed: both
losses every few steps, and how far apart the curves are, relatively: the means over windows of 8 steps, since single steps show
mostly which example was hard, and the validation loss before and after. DIR is a checkpoint with its tokenizer (exps/quickstart.sh
leaves SmolLM2-135M in output/quickstart/smollm2-135m); the data has `question` and `answer` on each line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOW = 8  # steps that are averaged


def write_data(source: Path, directory: Path, rows: int, held_out: int) -> Path:
    """The first rows for training, the next ones for validation, as instructions; a data.yaml for --data_config."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[: rows + held_out]]
    made = [json.dumps({"instruction": r["question"], "input": "", "output": r["answer"]}) + "\n" for r in lines]
    (directory / "train.jsonl").write_text("".join(made[:rows]))
    (directory / "val.jsonl").write_text("".join(made[rows:]))
    entries = [f"  - {{path: {split}.jsonl, type: text, split: {split}}}\n" for split in ("train", "val")]
    (directory / "data.yaml").write_text("META:\n" + "".join(entries))
    return directory / "data.yaml"


def run(given: argparse.Namespace, data: Path, out: Path, quant: str) -> tuple[list[float], list[float], float]:
    """(training losses by step, validation losses before and after, the largest memory in GB)."""
    flags = {
        "pretrained_path": given.pretrained_path, "data_config": data, "output_dir": out, "quant": quant,
        "max_steps": given.steps, "batch_size": given.batch_size, "lr": given.lr, "precision": given.precision,
        "lora_rank": given.lora_rank, "lora_alpha": 2 * given.lora_rank, "max_seq_len": given.max_seq_len,
        "seed": given.seed, "warmup_steps": 4, "lr_scheduler": "constant", "logging_steps": 1, "eval_steps": 10**6, "save_steps": 10**6,
        "report_to": "none", "keep_best": "false",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "accessory.main_finetune", *words], check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    return [line["loss"] for line in trained], validated, max(line["memory_gb"] for line in trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_path", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--max_seq_len", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.data.is_file():
        parser.error(f"--data {given.data}: no such file")
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(given.data, Path(directory), given.steps * given.batch_size, 32)
        runs = {kind: run(given, data, Path(directory) / kind, kind) for kind in ("none", "nf4")}
    (exact, exact_val, exact_gb), (nf4, nf4_val, nf4_gb) = runs["none"], runs["nf4"]
    means = [
        [sum(losses[i : i + WINDOW]) / len(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]
        for losses in (exact, nf4)
    ]
    print(
        f"steps              exact    nf4      apart   ({given.steps} steps of {given.batch_size}, {given.precision})"
    )
    for i, (a, b) in enumerate(zip(*means)):
        print(
            f"{WINDOW * i + 1:3d} to {min(WINDOW * (i + 1), given.steps):3d}         {a:.4f}   {b:.4f}   {b / a - 1:+.2%}"
        )
    a, b = (sum(losses) / len(losses) for losses in (exact, nf4))
    print(f"{'all':19s}{a:.4f}   {b:.4f}   {b / a - 1:+.2%}")
    for name, a, b in zip(("before", "after"), (exact_val[0], exact_val[-1]), (nf4_val[0], nf4_val[-1])):
        print(f"validation {name:8s}{a:.4f}   {b:.4f}   {b / a - 1:+.2%}")
    steps = max(abs(b / a - 1) for a, b in zip(exact, nf4))
    print(f"single steps: {steps:.2%} apart at most; memory {exact_gb:.2f} and {nf4_gb:.2f} GB")


if __name__ == "__main__":
    main()
