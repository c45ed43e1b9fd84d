"""Common beginnings of prompts once, or in every sequence: the same loss and gradients, at every layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.data.loader import num_tokens, train_windows
from accessory.data.sft import Example
from accessory.parallel import groups
from accessory.train import loop, objectives
from accessory.train.loop import to_device
from tests.dist import runs
from tests.dist.runs import Case
from tests.dist.test_families import finetune
from tests.helpers import run_ranks, write_tiny_checkpoint

CASES = [
    *(Case(mp, dp, tuning) for tuning in ("full", "lora") for mp, dp in ((1, 1), (2, 1), (1, 2))),
    Case(2, 2, "lora", checkpointing="selective"),
    Case(4, 1, "full", checkpointing="full"),
    Case(2, 1, "full", sequence_parallel=True),
    Case(2, 2, "lora", sequence_parallel=True),
]


def examples() -> list[Example]:
    """One system message of 13 tokens in front of all, another in the middle of some."""
    draw, made = np.random.default_rng(2), []
    first, then = draw.integers(1, 101, 13), draw.integers(1, 101, 9)
    for i, n in enumerate([4, 12, 7, 9, 3, 16, 5, 8]):
        begins = [first, then] if i % 3 else [first]
        ids = np.concatenate([*begins, draw.integers(1, 101, n)]).astype(np.int32)
        made.append(Example(ids, len(ids) - n + 1))
    return made


def first_step(case: Case, share: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Mean loss, this rank's tokens and whole gradients of one step over all examples."""
    run, data, seen = runs.prepare(case), examples(), 0
    (window,) = train_windows(
        data, batch_size=4, sequences_per_step=len(data), dp_rank=groups.dp_rank(), dp_size=case.dp, seed=3, epoch=0,
        share_prompts=share,
    )  # fmt: skip
    total = torch.zeros(())
    for batch in window.micro_batches:
        loss, _, _ = objectives.next_token(run.model, to_device(batch, groups.device()))
        (loss * case.dp / window.num_tokens).backward()
        total += loss.detach()
        seen += batch.tokens.shape[1]
    run.rules.sum_partial()
    torch.distributed.all_reduce(total)
    return total.item() / case.mp / window.num_tokens, seen, runs.whole_gradients(run)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_shared_is_unshared(tuning: str) -> None:
    reference, everything, expected = run_ranks(first_step, Case(tuning=tuning), False, world=1)[0]
    assert everything == sum(map(num_tokens, examples()))
    for case in [c for c in CASES if c.tuning == tuning]:
        for loss, seen, gradients in run_ranks(first_step, case, True, world=case.mp * case.dp):
            assert seen < 0.75 * everything / case.dp, case
            assert abs(loss / reference - 1) < 1e-5, case
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).abs().max() <= 1e-5 * max(1.0, expected[name].abs().max()), (case, name)
                assert expected[name].any()


# --- main_finetune ----------------------------------------------------------------------------------------------------


def tokens_seen(flags: dict[str, object]) -> list[int]:
    """A run's tokens in each batch, those of its validations too."""
    seen, usual = [], loop.to_device
    loop.to_device = lambda batch, *how: seen.append(batch.tokens.shape[1]) or usual(batch, *how)
    try:
        finetune(flags)
    finally:
        loop.to_device = usual
    return seen


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_flag_and_a_run_that_goes_on_with_the_other(tmp_path: Path) -> None:
    base, data = write_tiny_checkpoint(tmp_path / "base"), tmp_path / "data.jsonl"
    rows = [{"instruction": f"Say {w}.", "output": w} for w in ("red", "blue", "green", "white") * 3]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"pretrained_path": base, "data_config": data, "val_ratio": 0.3, "batch_size": 4, "lr": 1e-3, "report_to": "none"}
    flags |= {"precision": "fp32", "save_steps": 1, "eval_steps": 1, "resume": "auto"}
    seen, lines = {}, {}
    for name, shares in (("on", (True, True)), ("off", (False, False)), ("switched", (True, False))):
        run, seen[name] = tmp_path / name, []
        for steps, share in zip((1, 2), shares):
            how = {"output_dir": run, "max_steps": steps, "lr_scheduler": "constant", "share_prompts": share}
            seen[name] += run_ranks(tokens_seen, flags | how, world=1)[0]
        lines[name] = lines_of(run)
    half = len(seen["on"]) - 2  # the second run: a step and a validation
    assert all(a < 0.7 * b for a, b in zip(seen["on"], seen["off"], strict=True))
    assert seen["switched"] == seen["on"][:half] + seen["off"][half:]
    for name in ("on", "switched"):
        for one, other in zip(lines[name], lines["off"], strict=True):
            for key in {"loss", "grad_norm", "val_loss", "val_accuracy", "tokens"} & one.keys():
                assert one[key] == pytest.approx(other[key], rel=1e-5), (name, one["step"], key)
