"""The one training loop, and the only backward().

    window (all micro batches of a step) -> forward, backward * accum_iter -> mp sums -> norm -> clip -> step
        -> every logging_steps: metrics.jsonl; eval_steps: validation, best N, stop early?; sample_steps: answers to prompts;
           save_steps: a checkpoint; SIGTERM: save and leave

Loss and gradient are sums over supervised tokens divided by their number in the whole window over all dp ranks, known before
the first backward: how a window is cut into ranks and micro batches does not change the result. Test: tests/dist, tests/e2e, tests/unit/test_stop.py.
"""

import itertools
import math
from typing import Callable, Sequence

import torch
from torch import nn

from accessory import log
from accessory.data.loader import Batch, eval_batches, padded, train_windows, windows_per_epoch
from accessory.flags import LoopArgs
from accessory.model.attention import Segments
from accessory.model.targets import Targets
from accessory.parallel import groups, products, spare
from accessory.parallel.fsdp import DTYPES, gradients_travel, reshard
from accessory.parallel.grads import GradientRules
from accessory.train import optim
from accessory.train.profile import Phases, Profile
from accessory.train.state import Late, StepLines, StopSignal, TrainState, reseed

TEST_EVAL_BATCHES = 4  # of --as_test, on each rank


def every(steps: float, max_steps: int, windows: int) -> int:
    """--eval_steps, --save_steps or --sample_steps as a whole number of steps: a count, a share of the run, or (0) an epoch."""
    return windows if steps == 0 else math.ceil(round(steps * max_steps, 6)) if steps < 1 else int(steps)


def to_device(batch: Batch, device: torch.device, precision: str = "fp32") -> Batch:
    """The batch's tensors on the device, but for what is read on the host: labels and the bounds of the sequences. Padded where
    products in this precision want few lengths."""
    batch = padded(batch, products.padding(batch.tokens.shape[1], DTYPES[precision], device))
    rows = {name: groups.sent(getattr(batch, name), device) for name in ("tokens", "positions")}
    packed = Segments(batch.cu_seqlens, device, batch.after)
    # neither is a plain tensor any more: FSDP would send those to the device
    return batch._replace(**rows, cu_seqlens=packed, labels=Targets(batch.labels, device, packed))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rules: GradientRules,
    objective: Callable,
    train_set: Sequence,
    state: TrainState,
    args: LoopArgs,
    optim_args: optim.OptimArgs,
    *,
    precision: str,
    data_parallel: str,
    num_workers: int,
    run_log: log.RunLog,
    evaluate: Callable[[], dict[str, float]] | None,
    sample: Callable[[int], None] | None,
    save_best: int,
    save: Callable[[TrainState], None],
    save_failed: Callable[[], bool] = lambda: False,
    finish_save: Callable[[], None] = lambda: None,
    phases: Phases | None = None,
    profile: Profile | None = None,
) -> TrainState:
    """Trains from `state` to the last step. Every rank calls it with its own dp view of the same data.

    `save_best`: how many checkpoints that are best by --metric are saved, beside the others. `save` may go on after it
    returns: `save_failed` is asked every step, and where it is true on some rank `finish_save`, which waits for it, is to
    raise on all. `phases` is told what each part of the time was for; `profile` is asked after every step. Raises ValueError
    when MAX_SKIPPED_IN_A_ROW steps in a row had no finite gradient. Returns the state reached, saved; it is short of the
    last step only after SIGTERM or SIGINT, or where args.ends_early(state)."""
    device, dp_size = groups.device(), groups.dp_size()
    per_step = args.sequences_per_step(dp_size)
    windows = windows_per_epoch(len(train_set), per_step)
    max_steps = args.total_steps(windows)
    eval_every, save_every = every(args.eval_steps, max_steps, windows), every(args.save_steps, max_steps, windows)
    sample_every = every(args.sample_steps, max_steps, windows) if args.sample_steps else eval_every
    scale, in_a_row = optim.LossScale(precision, device), torch.zeros((), device=device)
    if state.loss_scale:
        scale.load_state_dict(state.loss_scale)
    signals, lines, late = StopSignal(), StepLines(run_log, state, args.logging_steps, max_steps), None
    phases = Phases(device) if phases is None else phases
    saved_at = state.step if state.step else None
    state.judge_by(args.metric)

    def look(validates: bool, samples: bool) -> bool:
        """Validation and answers, of the model as it is. Returns whether that ends the run, early."""
        if validates and evaluate is not None:
            state.note(evaluate(), save_best)
            run_log.write({"step": state.step, "epoch": state.epoch + state.window / windows, **state.metrics})
            log.say(f"step {state.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in state.metrics.items()), groups.rank())
        ends = args.ends_early(state) is not None
        if (samples or ends) and sample is not None:
            sample(state.step)
        reshard(model)
        model.train()
        phases.mark("evaluation")
        return ends

    def keep() -> None:
        nonlocal saved_at
        state.loss_scale = scale.state_dict() if scale.active else {}
        save(state)
        saved_at = state.step
        phases.mark("saving")

    done = state.step >= max_steps or args.ends_early(state) is not None
    # a signal ended the run before this step's validation
    missed = evaluate is not None and state.step % eval_every == 0 and state.validated_at != state.step
    if not done and (state.step == 0 or missed):
        if done := look(validates=True, samples=state.step % sample_every == 0):
            keep()
    model.train()
    run_log.start_bar(state.step)
    skipped_total = torch.tensor(float(state.skipped_steps), device=device)
    phases.mark("other")
    if profile is not None:
        profile.after(state.step)
        phases.mark("profile")
    lines.lap()
    while not done:
        stream = train_windows(
            train_set, batch_size=args.batch_size, sequences_per_step=per_step, dp_rank=groups.dp_rank(), dp_size=dp_size,
            seed=args.seed, epoch=state.epoch, start_window=state.window, num_workers=num_workers,
            share_prompts=args.share_prompts,
        )  # fmt: skip
        for window in stream:
            phases.mark("data")
            reseed(args.seed, state.step, groups.dp_rank())
            lr = optim.lr_at(state.step, max_steps, optim_args)
            loss_sum = torch.zeros((), device=device)
            for index, batch in enumerate(window.micro_batches):
                gradients_travel(model, data_parallel, last=index + 1 == len(window.micro_batches))
                loss, _, _ = objective(model, to_device(batch, device, precision))
                phases.mark("forward")
                # FSDP averages over dp; dividing before backward keeps fp16 sums from overflowing
                (loss * (scale.value * (dp_size / max(1, window.num_tokens)))).backward()
                loss_sum += loss.detach()
                phases.mark("backward")
            rules.sum_partial()
            loss_mean = groups.all_reduce(loss_sum, groups.dp_group()) / max(1, window.num_tokens)
            phases.mark("communication")
            norm = rules.global_norm() / scale.value
            found_inf = (~norm.isfinite()).float()
            optim.step(optimizer, lr, found_inf, optim.divisor(norm, optim_args.clip_grad, scale.value))
            scale.update(found_inf)
            skipped_total = skipped_total + found_inf
            in_a_row = (in_a_row + 1) * found_inf
            spare.trim()
            phases.mark("optimizer")

            state.advance(window.num_all_tokens, window.num_tokens, windows)
            if late is not None:
                lines.write(*late)
            record = {
                "step": state.step,
                "epoch": round(state.epoch + state.window / windows, 6),
                "lr": lr,
                "tokens": state.tokens,
                "window_tokens": window.num_all_tokens,
                "seconds": lines.lap(),
            }
            late = (Late(torch.stack((loss_mean, norm, skipped_total, in_a_row))), record)
            phases.mark("other")

            stop, failed = groups.any_rank(signals.received is not None, save_failed())
            phases.mark("communication")
            phases.step()
            if profile is not None:
                profile.after(state.step)
                phases.mark("profile")
            if failed:
                finish_save()
            done = stop or state.step >= max_steps
            evaluates, samples, saves = (done or state.step % n == 0 for n in (eval_every, sample_every, save_every))
            if evaluates or samples or saves:
                lines.write(*late)
                late = None
                if (evaluates or samples) and not stop:
                    done = look(evaluates, samples) or done
                    saves = saves or done or state.step in state.best_steps
                if saves and saved_at != state.step:
                    keep()
                lines.lap()
            if done:
                break
    finish_save()
    phases.mark("saving")
    signals.restore()
    return state


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Callable,
    dataset: Sequence,
    batch_size: int,
    show_progress: bool,
    most_batches: int | None = None,
    share_prompts: bool = False,
    precision: str = "fp32",
) -> dict[str, float]:
    """Loss, perplexity and accuracy over the whole set, weighted by token, each example once over the dp ranks; or over the
    first `most_batches` of each rank.

    Every rank calls it; the result is the same on all, to the bit: decisions hang on it."""
    from tqdm import tqdm

    was_training, device = model.training, groups.device()
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tokens, correct
    ranks = {"dp_rank": groups.dp_rank(), "dp_size": groups.dp_size()}
    batches = eval_batches(dataset, eval_batch_size=batch_size, share_prompts=share_prompts, **ranks)
    batches = itertools.islice(batches, most_batches)
    for batch in tqdm(batches, desc="validating", unit="batch", disable=not show_progress, leave=False):
        loss, count, metrics = objective(model, to_device(batch, device, precision))
        sums += torch.stack((loss.double(), count.double(), metrics["correct"].double()))
    loss, count, correct = groups.broadcast_object(groups.all_reduce(sums, groups.dp_group()).tolist())
    model.train(was_training)
    mean, accuracy = (loss / count, correct / count) if count else (math.nan, math.nan)  # 0 would be the best of all
    return {"val_loss": mean, "val_perplexity": math.exp(min(mean, 700)), "val_accuracy": accuracy}
