"""One training run, whatever its data and objective: plan, weights, loop, checkpoints. The main_* modules call it.

    start.py: what it starts from -> plan -> materialise -> optimizer -> loop.fit -> metrics.jsonl, step_* checkpoints

Test: tests/e2e
"""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, Callable

import torch

from accessory import log
from accessory.checkpoint import export, resume
from accessory.checkpoint.save import Beside, Saver
from accessory.data import carried
from accessory.data.loader import first_batches, windows_per_epoch
from accessory.data.readers import prompt_lines
from accessory.flags import ParallelArgs
from accessory.model import Transformer, shard_dim
from accessory.model.llama import kv_copied, replicated
from accessory.model.lora import TuningArgs, mark_trainable, partial_grad, saved_names, saved_terms
from accessory.model.pretrained import build, quantise
from accessory.parallel import groups
from accessory.parallel.fsdp import DTYPES
from accessory.parallel.grads import GradientRules
from accessory.tokenizer import Tokenizer
from accessory.train import loop, objectives, optim, plan
from accessory.train.directory import claim_shared, find_start
from accessory.train.profile import Phases, check_steps, profile_of, time_line
from accessory.train.start import (
    RunArgs,
    calibration_tokens,
    check_agree,
    check_code_agrees,
    check_flags_agree,
    materialise,
    model_terms,
    open_start,
    open_tokenizer,
    state_at,
    weights_sample,
    with_saved_batch,
)
from accessory.train.state import Stopwatch, TrainState

SAMPLE_TOKENS = 64
# answers to prompts: (training set, model, tokenizer, prompts, most new tokens) -> texts; collective
Answer = Callable[[Any, Transformer, Tokenizer, list[str], int], list[str]]


def train(
    run: RunArgs,
    parallel: ParallelArgs,
    tuning: TuningArgs,
    data: Any,
    optimizer_args: optim.OptimArgs,
    loop_args: loop.LoopArgs,
    load_data: Callable[[Any, Tokenizer, int], tuple[Any, Any]],
    answer: Answer,
) -> bool:
    """The whole run. `load_data(data, tokenizer, seed)` gives (training set, validation set or None), with `fingerprint`
    and `report`, alike on every rank; `data` also has num_workers. Every rank calls it. Returns whether nothing is left to
    do: not where a signal stopped it."""
    groups.init(parallel.model_parallel_size)
    check_code_agrees()
    check_flags_agree(run, parallel, tuning, data, optimizer_args, loop_args)
    torch.set_float32_matmul_precision("high" if parallel.precision == "tf32" else "highest")
    profiled = loop_args.profile_steps
    if loop_args.as_test:  # beside the run itself, which it must not disturb, and always anew
        run = dataclasses.replace(
            run, output_dir=str(Path(run.output_dir) / "as_test"), resume=None, overwrite_output_dir=True
        )
        loop_args = dataclasses.replace(loop_args, profile_steps="1:1" if loop_args.profile_steps else None)
    directory, began = Path(run.output_dir), Stopwatch()
    resumed = find_start(run, directory) if not run.dry_run else None
    if resumed is not None:
        loop_args = with_saved_batch(loop_args, resumed)
    prompts = groups.from_first_rank(lambda: read_prompts(run.sample_prompts))[: 1 if loop_args.as_test else None]
    checkpoint, args, tuning = open_start(run, tuning)
    tokenizer = open_tokenizer(run, checkpoint, args)
    model = build(checkpoint, args, tuning)  # without memory; what it refuses is said before minutes of tokenising
    mark_trainable(model, tuning)
    quantise(model, parallel)
    if parallel.quant and not saves_adapter(run, tuning):
        raise ValueError(
            f"--only_save_trainable false with --quant {parallel.quant}: the weights are held in 4 bits, only an adapter can be saved: leave it out, and merge with tools/merge_lora.py"
        )
    train_set, val_set = load_data(data, tokenizer, loop_args.seed)
    check_judged(loop_args, val_set)
    terms, held_out = model_terms(args, tuning), val_set.fingerprint if val_set is not None else None
    files = {"the model": terms, "training data": train_set.fingerprint, "validation data": held_out}
    if groups.world_size() > 1:
        files["weights"] = weights_sample(checkpoint)
    check_agree(files, "give every rank the same files")
    sequences = loop_args.sequences_per_step(groups.dp_size())
    max_steps = loop_args.total_steps(windows_per_epoch(len(train_set), sequences))
    real = dataclasses.replace(loop_args, as_test=False)
    check_steps(
        profiled, real.total_steps(windows_per_epoch(len(train_set), real.sequences_per_step(groups.dp_size())))
    )
    figures = plan.plan(model, checkpoint, parallel, loop_args, optimizer_args, train_set, max_steps)
    parallel = dataclasses.replace(parallel, checkpointing=figures["checkpointing"])  # what auto has become
    for line in plan.lines(figures):
        log.say(line, groups.rank())
    if run.dry_run:
        return True

    tokens = calibration_tokens(parallel, args, loop_args.as_test)
    position = {"fingerprint": train_set.fingerprint, "seed": loop_args.seed, "sequences_per_step": sequences}
    position |= {"quant": parallel.quant, "optim_states": optimizer_args.optim_states}
    position |= {"calibration_tokens": tokens} if parallel.quant else {}
    position |= {"model": terms, "validation": held_out, "dp": groups.dp_size()}
    state = state_at(resumed, position, data) if resumed is not None else TrainState()
    state.data = position
    if (ended := over(state, max_steps, loop_args)) is not None:
        log.say(f"finished: {directory / 'latest'} is at step {state.step} of {max_steps}; {ended}", groups.rank())
        return True

    claim_shared(directory)
    clock, calibrate_on = Stopwatch(), None
    if tokens:
        some = min(tokens, train_set.report.tokens)
        log.say(f"rounding to {parallel.quant} by what it does to {some:,} training tokens", groups.rank())
        ranks = {"dp_rank": groups.dp_rank(), "dp_size": groups.dp_size()}
        calibrate_on = first_batches(train_set, tokens, seed=loop_args.seed, **ranks)
    materialise(model, checkpoint, parallel, loop_args.seed, calibrate_on)
    log.say(f"weights {'loaded' if run.pretrained_path else 'drawn'} in {clock.lap():.1f} s", groups.rank())
    optimizer = optim.adamw(model, optimizer_args)
    if resumed is not None:
        resume.load(resumed, model, optimizer)
        log.say(f"continuing from {resumed}, step {state.step}", groups.rank())

    expected = json.loads((resumed / resume.MANIFEST).read_text())["base"] if resumed and tuning.partly else None
    template = getattr(train_set, "template", None)
    saves = saver(run, parallel, model, optimizer, checkpoint, tokenizer, tuning, expected, template)
    if run.overwrite_output_dir and groups.rank() == 0:
        resume.retire_all(directory)
    groups.barrier()
    flags = resolved(run, parallel, tuning, data, optimizer_args, loop_args, args)
    run_log = log.RunLog(directory, groups.rank(), run.report_to, state.step if resumed else None, max_steps, flags)
    if groups.rank() == 0:
        with log.naming(directory / "config.json"):
            (directory / "config.json").write_text(json.dumps(flags, indent=1))
    eval_batch = loop_args.eval_batch_size or loop_args.batch_size

    def evaluate() -> dict[str, float]:
        most = loop.TEST_EVAL_BATCHES if loop_args.as_test else None
        shows, share = groups.rank() == 0, loop_args.share_prompts
        return loop.evaluate(model, objectives.next_token, val_set, eval_batch, shows, most, share, parallel.precision)

    def sample(step: int) -> None:
        for prompt, text in zip(prompts, answer(train_set, model, tokenizer, prompts, SAMPLE_TOKENS)):
            log.say(f"step {step}: {prompt}\n    {text}", groups.rank())
            run_log.write({"step": step, "prompt": prompt, "answer": text}, file="samples.jsonl")

    addends = replicated if parallel.sequence_parallel else partial_grad
    rules = GradientRules(
        model, args.kv_heads, shard_dim, addends, kv_copied, cut_over_dp=parallel.data_parallel != "ddp"
    )
    phases = Phases(groups.device())
    profile = profile_of(loop_args.profile_steps, directory, state.step, groups.rank())
    try:
        state = loop.fit(
            model, optimizer, rules, objectives.next_token, train_set, state, loop_args, optimizer_args,
            precision=parallel.precision, data_parallel=parallel.data_parallel, num_workers=data.num_workers, run_log=run_log,
            evaluate=evaluate if val_set else None, sample=sample if prompts else None,
            save_best=run.keep_best_n if run.keep_best and val_set is not None else 0, save_failed=saves.failed, finish_save=saves.finish,
            save=lambda state: saves.start(state.step, state.to_json(), state.best_steps if run.keep_best else ()),
            phases=phases, profile=profile,
        )  # fmt: skip
        if profile is not None:
            profile.stop(state.step)  # the run ended before they did
        spent = phases.record()
        run_log.write({"step": state.step, "time": spent}, file="timing.jsonl")
        log.say(time_line(spent, groups.world_size()), groups.rank())
    except (ValueError, OSError):
        saves.settle()  # a checkpoint that is being written is still wanted
        raise
    finally:
        run_log.close()  # also ends the bar's line, so that an error stands on its own
    if loop_args.as_test:
        seconds, memory = began.lap(), log.peak_memory_gb()
        done = (
            f"as_test: one step, validation and a checkpoint went well in {seconds:.0f} s, {memory:.2f} GB at the peak"
        )
        log.say(f"{done}; what it left may be deleted: {directory}", groups.rank())
        return True
    early = loop_args.ends_early(state)
    say_end(state, max_steps, directory, saves_adapter(run, tuning), early)
    return state.step >= max_steps or early is not None


def saves_adapter(run: RunArgs, tuning: TuningArgs) -> bool:
    return tuning.partly if run.only_save_trainable is None else run.only_save_trainable


def saver(
    run: RunArgs,
    parallel: ParallelArgs,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    checkpoint: Any,
    tokenizer: Tokenizer,
    tuning: TuningArgs,
    expected_base: dict[str, Any] | None,
    template: dict[str, Any] | None = None,
) -> Saver:
    """What writes the checkpoints of this run: weights or adapter, tokenizer, the data's template if they have one, exact
    state. Every rank calls it."""
    identity = export.BaseIdentity(checkpoint, expected_base)
    terms, names, params = saved_terms(model, tuning), saved_names(model, tuning), model.args.to_dict()

    def about() -> dict[str, Any]:
        return {"base": identity.record(), "tokenizer": tokenizer.fingerprint}

    def also(into: Path) -> list[Path]:
        return save_tokenizer(tokenizer, into, template)

    if saves_adapter(run, tuning):
        beside: Beside = export.Adapter(names, terms, params, about, also)
    else:
        names_on_disk = checkpoint.source.names()
        dtypes = {n: checkpoint.source.dtype(n) for n in names_on_disk}
        if not names_on_disk:  # drawn, not read
            dtypes = dict.fromkeys(dict(model.named_parameters()), DTYPES[parallel.precision])
        inside = params | (terms if tuning.lora_rank else {})
        beside = export.Weights(model, inside, dtypes, run.embedding_dim, about, also)
    return Saver(Path(run.output_dir), model, optimizer, names, beside, run.save_total_limit)


def save_tokenizer(tokenizer: Tokenizer, into: Path, template: dict[str, Any] | None) -> list[Path]:
    before = set(into.iterdir())
    tokenizer.save(into)
    if template is not None:
        carried.write(template, into)
    return sorted(set(into.iterdir()) - before)


def read_prompts(given: str | None) -> list[str]:
    if not given:
        return []
    if Path(given).is_file():
        return prompt_lines(given, "--sample_prompts")
    if len(given.split()) == 1 and (given.endswith(".txt") or given.startswith(("/", "./", "../", "~"))):
        raise ValueError(f"--sample_prompts {given}: no such file: correct the path, or write an instruction")
    return [given]


def resolved(*sections: Any) -> dict[str, Any]:
    """Every flag as it was resolved, by section: config.json."""
    return {type(s).__name__: dataclasses.asdict(s) for s in sections}


def check_judged(args: loop.LoopArgs, val_set: Any) -> None:
    """Raises ValueError where a run is to end by a validation that it does not have."""
    for name in ("early_stop_patience", "stop_perplexity"):
        if getattr(args, name) is not None and not val_set:
            raise ValueError(
                f"--{name} {getattr(args, name):g}: there is no validation data: give some, with --val_ratio for instance"
            )


def over(state: TrainState, max_steps: int, args: loop.LoopArgs) -> str | None:
    """Why the run that stands here is at its end, and what would go on; None where it is not."""
    if state.step >= max_steps:
        return "a larger --max_steps or --epochs goes on"
    early = args.ends_early(state)
    return None if early is None else f"{early}; another value of that flag, or none, goes on"


def say_end(state: TrainState, max_steps: int, directory: Path, adapter: bool, early: str | None = None) -> None:
    if state.step < max_steps and early is None:
        log.say(f"stopped at step {state.step} of {max_steps}, saved; the same command continues", groups.rank())
        return
    best = f", best {state.best_step} ({abs(state.best):.4f})" if state.best is not None else ""
    then = (
        f"python tools/merge_lora.py --adapters {shlex.quote(f'{directory}/latest')} --dst DIR"
        if adapter
        else f"python tools/meta_to_hf.py --src {shlex.quote(f'{directory}/latest')} --dst DIR"
    )
    why = f" of {max_steps}, ended early: {early}" if early and state.step < max_steps else ""
    log.say(f"done: {state.step} steps{why}, {state.tokens} tokens{best}; next: {then}", groups.rank())


def say_counts(train_set: Any, val_set: Any, more: Callable[[Any], str]) -> None:
    """One line a data set: what an epoch of it is, and `more(report)`."""
    for name, data in (("training", train_set), ("validation", val_set)):
        if data is not None:
            r = data.report
            what = f"{r.examples} examples, {r.tokens} tokens, {r.supervised_tokens} with loss"
            log.say(f"{name} data: {what} ({more(r)})", groups.rank())
