"""Fine-tune a LLaMA checkpoint on instructions, from its shards, at any model-parallel size: in full, or with LoRA.

    torchrun --nproc_per_node 2 -m accessory.main_finetune --pretrained_path DIR --data_config data.yaml --output_dir out
             --model_parallel_size 2 --lora_rank 8 ...

exps/finetune_7b.sh and exps/finetune_lora_7b.sh are the usual way in; they launch it through `accessory.launch`, which is
torchrun with a quiet end. The same command again continues the run (--resume auto).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from accessory import config, log
from accessory.checkpoint import export, resume
from accessory.config import flag
from accessory.data.loader import micro_batches, windows_per_epoch
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.data.templates import encode_prompt, prompt
from accessory.generation.engine import generate
from accessory.model import Transformer, shard_dim
from accessory.model.args import TUNING_KEYS, ModelArgs, read_params, tuning_keys
from accessory.model.llama import kv_copied
from accessory.model.lora import TuningArgs, mark_trainable, partial_grad
from accessory.model.pretrained import build, fill, open_pretrained
from accessory.parallel import groups
from accessory.parallel.fsdp import ParallelArgs, sharder
from accessory.parallel.grads import GradientRules
from accessory.tokenizer import Tokenizer
from accessory.train import loop, objectives, optim, plan
from accessory.train.state import Stopwatch, TrainState

MAX_SPARE_ROWS = 512  # an embedding may have so many rows more than the tokenizer has tokens: published ones are padded
SAMPLE_TOKENS = 64


@dataclass
class RunArgs:
    """The run: what it starts from and what it leaves"""

    pretrained_path: str = flag("", "directory (or .gguf) of the checkpoint to start from, in any format that is read")
    pretrained_type: str | None = flag(
        None, "insist on this format; none: recognised", choices=("meta_ori", "consolidated", "hf", "gguf")
    )
    llama_config: list[str] = flag([], "params.json-style files, later keys win; none: the checkpoint's own")
    tokenizer_path: str | None = flag(None, "tokenizer.model or tokenizer.json; none: the checkpoint's own")
    output_dir: str = flag("", "run directory: metrics.jsonl, samples, step_* checkpoints")
    overwrite_output_dir: bool = flag(
        False, "start anew in an output_dir that holds a run (its old checkpoints are deleted)"
    )
    resume: str | None = flag(
        None, "auto: continue output_dir's newest whole checkpoint, or start; or a step_* directory"
    )
    save_total_limit: int | None = flag(None, "keep so many newest checkpoints; none: all")
    keep_best: bool = flag(True, "also save and keep the checkpoint that is best by --metric")
    only_save_trainable: bool | None = flag(
        None, "save an adapter, or all weights (false); none: an adapter if anything is frozen"
    )
    embedding_dim: int = flag(
        0, "how saved shards split tok_embeddings: 0 vocabulary (Llama 3), 1 features (Llama 1 and 2)"
    )
    sample_prompts: str | None = flag(
        None, "an instruction, or a text file with one on each line, answered at every validation"
    )
    report_to: str = flag("tensorboard", "beside metrics.jsonl", choices=("none", "tensorboard"))
    dry_run: bool = flag(False, "print the plan (parameters, memory, steps, tokens) and stop")

    def __post_init__(self) -> None:
        for name in ("pretrained_path", "output_dir"):
            if not getattr(self, name) and not (name == "output_dir" and self.dry_run):
                raise ValueError(f"--{name} is missing: name a directory")
        if self.embedding_dim not in (0, 1):
            raise ValueError(f"--embedding_dim {self.embedding_dim}: 0 or 1")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"--save_total_limit {self.save_total_limit}: at least 1, the only whole checkpoint is never deleted"
            )


def main(
    run: RunArgs,
    parallel: ParallelArgs,
    tuning: TuningArgs,
    data: DataArgs,
    optimizer_args: optim.OptimArgs,
    loop_args: loop.LoopArgs,
) -> None:
    groups.init(parallel.model_parallel_size)
    torch.set_float32_matmul_precision("high" if parallel.precision == "tf32" else "highest")
    directory = Path(run.output_dir)
    resumed = find_start(run, directory) if not run.dry_run else None
    if resumed is not None:
        loop_args = with_saved_batch(loop_args, resumed)
    checkpoint, args = open_pretrained(run.pretrained_path, run.pretrained_type, run.llama_config)
    tuning = with_config_keys(tuning, run.llama_config)
    check_carried(run, checkpoint, tuning)
    tokenizer = open_tokenizer(run, checkpoint, args)
    train_set, val_set = load_sft(data, tokenizer, loop_args.seed, show_progress=groups.rank() == 0)
    say_data(train_set, val_set)

    model = build(checkpoint, args, tuning)
    trained = mark_trainable(model, tuning)
    windows = windows_per_epoch(len(train_set), loop_args.sequences_per_step(groups.dp_size()))
    max_steps = loop_args.total_steps(windows)
    figures = plan.plan(model, checkpoint, parallel, loop_args, optimizer_args, train_set, max_steps)
    for line in plan.lines(figures):
        log.say(line, groups.rank())
    if run.dry_run:
        return

    clock = Stopwatch()
    materialise(model, checkpoint, parallel, loop_args.seed)
    log.say(f"weights loaded in {clock.lap():.1f} s", groups.rank())
    optimizer = optim.adamw(model, optimizer_args)
    state = TrainState()
    position = {
        "fingerprint": train_set.fingerprint,
        "seed": loop_args.seed,
        "sequences_per_step": loop_args.sequences_per_step(groups.dp_size()),
    }
    if resumed is not None:
        state = continue_from(resumed, model, optimizer, position)
    state.data = position
    if state.step >= max_steps:
        log.say(
            f"finished: {directory / 'latest'} is at step {state.step} of {max_steps}; a larger --max_steps or --epochs goes on",
            groups.rank(),
        )
        return

    expected = json.loads((resumed / resume.MANIFEST).read_text())["base"] if resumed and tuning.partly else None
    save = saver(run, model, optimizer, checkpoint, tokenizer, tuning, trained, expected)
    prompts = read_prompts(run.sample_prompts)
    if run.overwrite_output_dir and groups.rank() == 0:
        resume.retire_all(directory)
    groups.barrier()
    run_log = log.RunLog(
        directory, groups.rank(), run.report_to == "tensorboard", state.step if resumed else None, max_steps
    )
    if groups.rank() == 0:
        write_config(directory, run, parallel, tuning, data, optimizer_args, loop_args, args)
    eval_batch = loop_args.eval_batch_size or loop_args.batch_size

    def evaluate() -> dict[str, float]:
        return loop.evaluate(model, objectives.next_token, val_set, eval_batch, show_progress=groups.rank() == 0)

    rules = GradientRules(
        model, args.kv_heads, shard_dim, partial_grad, kv_copied, cut_over_dp=parallel.data_parallel != "ddp"
    )
    try:
        state = loop.fit(
            model, optimizer, rules, objectives.next_token, train_set, state, loop_args, optimizer_args,
            precision=parallel.precision, data_parallel=parallel.data_parallel, num_workers=data.num_workers, run_log=run_log,
            evaluate=evaluate if val_set else None, sample=(lambda step: sample(model, tokenizer, prompts, step, run_log)) if prompts else None,
            save_best=run.keep_best and val_set is not None, save=save,
        )  # fmt: skip
    finally:
        run_log.close()  # also ends the bar's line, so that an error stands on its own
    say_end(state, max_steps, directory, saves_adapter(run, tuning))


def saves_adapter(run: RunArgs, tuning: TuningArgs) -> bool:
    return tuning.partly if run.only_save_trainable is None else run.only_save_trainable


def saver(
    run: RunArgs,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    checkpoint: Any,
    tokenizer: Tokenizer,
    tuning: TuningArgs,
    trained: list[str],
    expected_base: dict[str, Any] | None,
) -> Callable[[TrainState], None]:
    """The function that writes a checkpoint of this run: weights or adapter, tokenizer, exact state. Every rank calls it."""
    identity = export.BaseIdentity(checkpoint, expected_base)
    dtypes = {n: checkpoint.source.dtype(n) for n in checkpoint.source.names()}
    terms = {k: getattr(tuning, k) for k in TUNING_KEYS} | {"lora_alpha": tuning.scale * tuning.lora_rank}
    params = model.args.to_dict()

    def write_weights(into: Path, step: int) -> list[Path]:
        if saves_adapter(run, tuning):
            files = export.write_trained(into, model, trained, terms | {"base": identity.record()}, params, step)
        else:
            inside = params | (terms if tuning.lora_rank else {})
            files = export.write_model(into, model, inside, dtypes, run.embedding_dim)
        return files + (save_tokenizer(tokenizer, into) if groups.rank() == 0 else [])

    def save(state: TrainState) -> None:
        about = {"base": identity.record(), "tokenizer": tokenizer.fingerprint, "metrics": state.metrics}
        path = resume.save(
            Path(run.output_dir), state.step, model, optimizer, state.to_json(),
            lambda into: write_weights(into, state.step), about,
            run.save_total_limit, state.best_step if run.keep_best else None,
        )  # fmt: skip
        log.say(f"step {state.step}: saved {path}", groups.rank())

    return save


def find_start(run: RunArgs, directory: Path) -> Path | None:
    """The checkpoint to continue from, None to start. Raises ValueError when output_dir holds a run that nobody asked about."""
    if run.resume is not None and not run.overwrite_output_dir:
        found, passed_over = groups.from_first_rank(lambda: resume.find(directory, run.resume))  # it hashes every file
        for wrong in passed_over:
            log.say(f"--resume auto: passed over a damaged checkpoint: {wrong}", groups.rank())
        return found
    if resume.steps(directory) or (directory / "metrics.jsonl").exists():
        if not run.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {directory} already holds a run: continue it with --resume auto, choose another, or start anew with --overwrite_output_dir true"
            )
    return None


def with_saved_batch(args: loop.LoopArgs, resumed: Path) -> loop.LoopArgs:
    """On another number of data-parallel ranks a run goes on with the batch it had: the same sequences in every step, cut
    into more or fewer micro batches. Flags that ask for another batch are left for `continue_from` to refuse."""
    then = json.loads((resumed / resume.MANIFEST).read_text())["dp"]
    saved = json.loads((resumed / "resume" / resume.STATE).read_text())["data"].get("sequences_per_step")
    now = groups.dp_size()
    if saved is None or then == now or args.global_batch_size is not None or args.sequences_per_step(now) == saved:
        return args
    count = micro_batches(saved, args.batch_size, now)
    log.say(
        f"{now} data-parallel rank(s), {then} when it was saved: the same {saved} sequences a step in {count} micro batch(es)",
        groups.rank(),
    )
    return dataclasses.replace(args, global_batch_size=saved)


def with_config_keys(tuning: TuningArgs, files: list[str]) -> TuningArgs:
    """Tuning keys in --llama_config files are the flags' defaults; a flag that was written out wins."""
    keys = {k: v for k, v in tuning_keys(read_params(files)).items() if k not in tuning.given}
    for name in ("lora_targets", "modules_to_save"):
        if isinstance(keys.get(name), str):
            keys[name] = [part for part in keys[name].split(",") if part]
    keys["lora_rank"] = max(0, keys.get("lora_rank", tuning.lora_rank))  # Accessory writes -1 for none
    return dataclasses.replace(tuning, **keys)


def check_carried(run: RunArgs, checkpoint: Any, tuning: TuningArgs) -> None:
    """Adapters inside the checkpoint go on at their own rank and scale, or not at all. Raises ValueError with the remedy."""
    if checkpoint.adapter is None:
        return
    merge = f"merge it first: python tools/merge_lora.py --adapter {run.pretrained_path} --dst DIR"
    if (Path(run.pretrained_path) / "adapter.json").exists():
        raise ValueError(f"--pretrained_path {run.pretrained_path} is an adapter, not a model: {merge}")
    rank, alpha = checkpoint.adapter["lora_rank"], checkpoint.adapter["lora_alpha"]
    if tuning.lora_rank != rank or tuning.scale * rank != alpha:
        raise ValueError(
            f"--pretrained_path {run.pretrained_path} has LoRA inside: give --lora_rank {rank} --lora_alpha {alpha:g} to go on "
            f"with it, or {merge}"
        )


def open_tokenizer(run: RunArgs, checkpoint: Any, args: ModelArgs) -> Tokenizer:
    """The tokenizer, checked against the embedding."""
    path = run.tokenizer_path or checkpoint.tokenizer
    if path is None:
        raise ValueError(
            f"{run.pretrained_path} has no tokenizer.model or tokenizer.json beside it: name one with --tokenizer_path"
        )
    tokenizer = Tokenizer.open(path)
    if not 0 <= args.vocab_size - tokenizer.vocab_size <= MAX_SPARE_ROWS:
        raise ValueError(
            f"--tokenizer_path {path} has {tokenizer.vocab_size} tokens, the embedding of {run.pretrained_path} has {args.vocab_size} rows: they do not belong together, name the checkpoint's own"
        )
    return tokenizer


def say_data(train_set: SFTDataset, val_set: SFTDataset | None) -> None:
    for name, data in (("training", train_set), ("validation", val_set)):
        if data is not None:
            r = data.report
            log.say(
                f"{name} data: {r.examples} examples, {r.tokens} tokens, {r.supervised_tokens} with loss ({r.truncated} cut, {r.dropped} dropped as too long)",
                groups.rank(),
            )


def materialise(model: Transformer, checkpoint: Any, parallel: ParallelArgs, seed: int) -> None:
    """Fills the empty model and shards it, layer by layer: weights -> checkpointing -> compile -> FSDP."""
    shard = sharder(parallel.data_parallel, parallel.precision, parallel.cpu_offload)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    if parallel.compile:  # graphs are shared by the layers, not by training, validation, packed and single sequences
        torch._dynamo.config.recompile_limit = 64

    def after_block(layer: torch.nn.Module) -> None:
        layer.checkpointing = parallel.checkpointing
        if parallel.compile:
            # not the whole layer: around checkpoint() any graph break would leave all of it uncompiled
            layer.compute = torch.compile(layer.compute)
        shard(layer)

    dtype_of = lambda name: torch.float32 if name in trains else None  # noqa: E731  masters fp32, the frozen as in the file
    fill(model, checkpoint, dtype_of, groups.device(), seed, after_block, show_progress=groups.rank() == 0)
    shard(model)


def continue_from(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer, position: dict[str, Any]
) -> TrainState:
    """Weights, moments and position of a checkpoint. Raises ValueError when the order of samples would differ."""
    saved = resume.load(path, model, optimizer)
    state = TrainState.from_json({k: v for k, v in saved.items() if k in TrainState.__dataclass_fields__})
    for key, name in (
        ("fingerprint", "the training data, tokenizer or data flags"),
        ("seed", "--seed"),
        ("sequences_per_step", "the batch (--batch_size x --accum_iter x data-parallel ranks, or --global_batch_size)"),
    ):
        if state.data.get(key) != position[key]:
            raise ValueError(
                f"--resume {path}: {name} changed ({state.data.get(key)} then, {position[key]} now): restore it, or start anew in another --output_dir"
            )
    log.say(f"continuing from {path}, step {state.step}", groups.rank())
    return state


def save_tokenizer(tokenizer: Tokenizer, into: Path) -> list[Path]:
    before = set(into.iterdir())
    tokenizer.save(into)
    return sorted(set(into.iterdir()) - before)


def read_prompts(given: str | None) -> list[str]:
    if not given:
        return []
    if Path(given).is_file():
        return [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [given]


def sample(model: Transformer, tokenizer: Tokenizer, prompts: list[str], step: int, run_log: log.RunLog) -> None:
    """Greedy answers to the prompts, on the terminal and in samples.jsonl. Every rank calls it."""
    ids = [encode_prompt(tokenizer, prompt(p)) for p in prompts]
    answers = generate(model, ids, SAMPLE_TOKENS, eos_ids=tokenizer.eos_ids)
    for text, head, answer in zip(prompts, ids, answers):
        answer = tokenizer.decode(answer, after=head).strip()
        log.say(f"step {step}: {text}\n    {answer}", groups.rank())
        run_log.write({"step": step, "prompt": text, "answer": answer}, file="samples.jsonl")


def write_config(directory: Path, *sections: Any) -> None:
    """config.json: every flag as it was resolved."""
    resolved = {type(s).__name__: dataclasses.asdict(s) for s in sections}
    (directory / "config.json").write_text(json.dumps(resolved, indent=1))


def say_end(state: TrainState, max_steps: int, directory: Path, adapter: bool) -> None:
    if state.step < max_steps:
        log.say(f"stopped at step {state.step} of {max_steps}, saved; the same command continues", groups.rank())
        return
    best = f", best {state.best_step} ({abs(state.best):.4f})" if state.best is not None else ""
    then = (
        f"python tools/merge_lora.py --adapter {directory}/latest --dst DIR"
        if adapter
        else f"python tools/meta_to_hf.py --src {directory}/latest --dst DIR"
    )
    log.say(f"done: {state.step} steps, {state.tokens} tokens{best}; next: {then}", groups.rank())


def entry(*sections: Any) -> None:
    main(*sections)
    groups.destroy()


if __name__ == "__main__":
    config.run(entry, RunArgs, ParallelArgs, TuningArgs, DataArgs, optim.OptimArgs, loop.LoopArgs, doc=__doc__)
