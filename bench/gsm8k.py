"""GSM8K on a real small model: what a short run learns, and what packing saves beside padding every example to 512.

    python -m bench.gsm8k --part learn --pretrained_path DIR --gsm8k DIR [--steps 20] [--seeds 3]
    python -m bench.gsm8k --part pace --pretrained_path DIR --gsm8k DIR [--rounds 3]

learn: main_finetune on the training questions (every weight, bf16, Alpaca's prompt, loss on the answers), 8 a step; validation on
the first questions of the test set, before and after. No token is new, so nothing falls merely because it was never seen.
pace: forward and backward of the same examples, question and answer alone, packed as the loop packs them and padded to 512 in batches, one after the other;
tokens of the examples a CPU second and a second. DIR of --gsm8k has train.jsonl and test.jsonl as published (or gsm8k_*.jsonl).
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from accessory.config import run_tool
from accessory.data.loader import train_windows
from accessory.data.sft import DataArgs, load_sft
from accessory.model.pretrained import load
from accessory.tokenizer import Tokenizer
from accessory.train import objectives

EXPECTED = (
    0.05  # least fall of the validation perplexity, worst seed, after 20 steps: written down before the first run
)
SEQUENCES, VALIDATED, LENGTH = 8, 64, 512


def write_data(gsm8k: str, directory: Path, rows: int | None = None) -> Path:
    """Questions and answers as instructions: a data.yaml for --data_config."""
    for split, name, most in (("train", "train", rows), ("val", "test", VALIDATED)):
        source = next((p for n in (name, f"gsm8k_{name}") if (p := Path(gsm8k, f"{n}.jsonl")).is_file()), None)
        if source is None:
            raise ValueError(f"--gsm8k {gsm8k}: no {name}.jsonl there")
        records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:most]]
        lines = (json.dumps({"instruction": r["question"], "input": "", "output": r["answer"]}) for r in records)
        (directory / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    entries = [f"  - {{path: {split}.jsonl, type: text, split: {split}}}\n" for split in ("train", "val")]
    (directory / "data.yaml").write_text("META:\n" + "".join(entries))
    return directory / "data.yaml"


def learn(pretrained_path: str, gsm8k: str, steps: int, seeds: int) -> None:
    falls = []
    with tempfile.TemporaryDirectory() as name:
        data = write_data(gsm8k, Path(name))
        for seed in range(seeds):
            out = Path(name, f"seed{seed}")
            flags = {
                "pretrained_path": pretrained_path, "data_config": data, "output_dir": out, "seed": seed, "max_steps": steps,
                "batch_size": 4, "global_batch_size": SEQUENCES, "lr": 1e-4, "warmup_steps": 2, "precision": "bf16",
                "max_seq_len": LENGTH, "eval_steps": steps, "save_steps": steps, "report_to": "none", "keep_best": "false",
            }  # fmt: skip
            words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            subprocess.run([sys.executable, "-m", "accessory.main_finetune", *words], check=True, stdout=sys.stderr)
            records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            before, *_, after = [r["val_perplexity"] for r in records if "val_perplexity" in r]
            falls.append(1 - after / before)
            print(
                f"seed {seed}: validation perplexity {before:.4f} -> {after:.4f} after {steps} steps, {falls[-1]:.1%} lower"
            )
    print(f"worst seed: {min(falls):.1%} lower (expected before the run: at least {EXPECTED:.0%})")


def pace(pretrained_path: str, gsm8k: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = str(write_data(gsm8k, Path(name), rows=400))
        data = DataArgs(data_config=config, max_seq_len=LENGTH, template="none")
        train_set, _ = load_sft(data, Tokenizer.open(pretrained_path), 0)
        model = load(pretrained_path, dtype=torch.bfloat16)
        model.train()
        windows = train_windows(
            train_set, batch_size=SEQUENCES, sequences_per_step=SEQUENCES, dp_rank=0, dp_size=1,
            seed=0, epoch=0, start_window=0, num_workers=0,
        )  # fmt: skip
        batches = [window.micro_batches[0] for _, window in zip(range(rounds + 1), windows)]
        sides: dict[str, list[tuple[float, float, float]]] = {"packed": [], "padded": []}
        for i, batch in enumerate(batches):
            for side, made in (("packed", batch), ("padded", padded(batch))):
                took = step(model, made)
                if i:  # the first of each warms up
                    sides[side].append(took)
            assert abs(took[2] - sides["packed"][-1][2]) < 2e-2 * took[2] if i else True, "the losses differ"
    tokens = [batch.tokens.numel() for batch in batches[1:]]
    for side, runs in sides.items():
        speeds = [(n / wall, n / cpu) for n, (wall, cpu, _) in zip(tokens, runs)]
        print(
            f"{side}: {statistics.median(s for s, _ in speeds):.0f} tokens/s, {statistics.median(s for _, s in speeds):.0f} a CPU second"
        )
    ratios = [(b[0] / a[0], b[1] / a[1]) for a, b in zip(sides["packed"], sides["padded"])]
    print(
        f"packed is {statistics.median(r for r, _ in ratios):.2f} times as fast, {statistics.median(r for _, r in ratios):.2f} by CPU time"
    )


def padded(batch):
    """The same sequences, one a row, as long as LENGTH."""
    bounds = batch.cu_seqlens.tolist()
    rows, labels = (torch.full((len(bounds) - 1, LENGTH), fill, dtype=torch.int64) for fill in (0, -100))
    for row, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        rows[row, : stop - start] = batch.tokens[0, start:stop]
        labels[row, : stop - start] = batch.labels[0, start:stop]
    return batch._replace(tokens=rows, labels=labels, positions=None, cu_seqlens=None)


def step(model: torch.nn.Module, batch) -> tuple[float, float, float]:
    """(seconds, CPU seconds, summed loss) of one forward and backward."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    loss, _, _ = objectives.next_token(model, batch)
    loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF)
    model.zero_grad(set_to_none=True)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return time.perf_counter() - start, cpu, float(loss.detach())


def main(*, part: str, pretrained_path: str, gsm8k: str, steps: int = 20, seeds: int = 3, rounds: int = 3) -> None:
    """--part learn: main_finetune on GSM8K's training questions, the validation perplexity before and after, for so many --seeds.
    --part pace: the same examples packed and padded to 512, tokens a second of both; so many --rounds.

    --pretrained_path is a checkpoint with its tokenizer, --gsm8k a directory with train.jsonl and test.jsonl."""
    if part not in ("learn", "pace"):
        raise ValueError(f"--part {part}: learn or pace")
    for name, value in (("steps", steps), ("seeds", seeds), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} {value}: 1 or more")
    learn(pretrained_path, gsm8k, steps, seeds) if part == "learn" else pace(pretrained_path, gsm8k, rounds)


if __name__ == "__main__":
    run_tool(main)
