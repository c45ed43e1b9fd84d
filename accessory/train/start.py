"""What a run starts from: weights on disk or drawn anew, an adapter, the tokenizer, where an earlier checkpoint stands.

    directory.find_start -> open_start: checkpoint, sizes, tuning -> open_tokenizer -> state_at -> materialise

Test: tests/e2e/test_bad_input.py, tests/e2e/test_resume.py, tests/e2e/test_pretrain.py
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import accessory
from accessory import log
from accessory.checkpoint import resume
from accessory.checkpoint.adapter import model_args, with_adapter
from accessory.checkpoint.formats import is_adapter
from accessory.data.loader import Batch, micro_batches
from accessory.flags import ParallelArgs, RunArgs
from accessory.model import Transformer
from accessory.model.args import ModelArgs, read_params, tuning_keys
from accessory.model.lora import TuningArgs, packed_weights
from accessory.model.pretrained import fill, open_fresh, open_pretrained
from accessory.parallel import groups
from accessory.parallel.fsdp import sharder
from accessory.tokenizer import Tokenizer
from accessory.train import loop
from accessory.train.state import TrainState

SELECTIVE_BUDGET = 0.7  # of what a compiled layer keeps by itself: the partitioner takes again what costs least
AS_TEST_TOKENS = 256  # that --as_test calibrates on
PLACES = {"pretrained_path", "lora_path", "llama_config", "tokenizer_path", "data_config", "corpus", "output_dir"}
OWN = PLACES | {"sample_prompts", "report_to", "num_workers"}  # flags that may differ from rank to rank


def open_start(run: RunArgs, tuning: TuningArgs) -> tuple[Any, ModelArgs, TuningArgs]:
    """(Checkpoint, sizes, tuning): the weights that are trained on, with the terms of an adapter that goes on. No weights
    are read. Without --pretrained_path the checkpoint is an empty one, whose weights are drawn."""
    tuning = with_config_keys(tuning, run.llama_config)
    if not run.pretrained_path:
        if tuning.partly or run.lora_path:
            raise ValueError("--pretrained_path is missing: an adapter, or a frozen part, needs weights to stand on")
        if not run.tokenizer_path:
            raise ValueError("--tokenizer_path is missing: from random weights, the vocabulary is the tokenizer's")
        return *open_fresh(run.llama_config, Tokenizer.open(run.tokenizer_path).vocab_size), tuning
    checkpoint, args = open_pretrained(run.pretrained_path, run.pretrained_type, run.llama_config)
    check_carried(run, checkpoint, tuning)
    if run.lora_path:
        checkpoint, tuning = with_adapter(checkpoint, run.lora_path, tuning)
        told = model_args(checkpoint)  # an adapter with a trained embedding or head may have more rows, or untie them
        args = dataclasses.replace(args, vocab_size=told.vocab_size, tie_word_embeddings=told.tie_word_embeddings)
        if tuning.bias_tuning:
            args = dataclasses.replace(args, attention_bias=told.attention_bias, mlp_bias=told.mlp_bias)
    return checkpoint, args, tuning


def check_code_agrees() -> None:
    """Raises ValueError where a rank runs another torch or other files of ours, which a node with a checkout of its own may have:
    they would differ in what they exchange, or in results. Every rank calls it, before anything else is compared."""
    digest, root = hashlib.sha256(), Path(accessory.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    known = {"torch": torch.__version__, "files of accessory": digest.hexdigest()[:16]}
    check_agree(known, "install the same on every node")


def check_flags_agree(*sections: Any) -> None:
    """Raises ValueError where a rank was started with another flag than rank 0: it would wait for ever, or train otherwise.
    Every rank calls it. Where files lie may differ; what they hold, `check_agree` is told."""
    flags = {k: v for section in sections for k, v in dataclasses.asdict(section).items()}
    check_agree({f"--{k}": v for k, v in flags.items() if k not in OWN}, "start every rank with the same flags")


def check_agree(known: dict[str, Any], remedy: str) -> None:
    """Raises ValueError on every rank, naming the first rank and thing that is not as on rank 0. Every rank calls it."""
    first, *others = groups.all_gather_object(known)
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs[name] != value:
                raise ValueError(f"rank {rank} has {name} {theirs[name]}, rank 0 {value}: {remedy}")


def weights_sample(checkpoint: Any, count: int = 64) -> str:
    """sha256 over the first rows of up to `count` tensors, in fp32, so that formats do not matter: other weights of the same
    shape, a merge or a later version, differ in some of them. Reads a row of each, no more."""
    names = sorted(checkpoint.source.names())
    digest = hashlib.sha256()
    for name in random.Random(0).sample(names, min(count, len(names))):
        row = checkpoint.source.read(name, 0, 0, 1).float()
        row[row.isnan()] = torch.nan  # the one NaN
        digest.update(name.encode() + row.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def with_saved_batch(args: loop.LoopArgs, resumed: Path) -> loop.LoopArgs:
    """On another number of data-parallel ranks a run goes on with the batch it had: the same sequences in every step, cut
    into more or fewer micro batches. Flags that ask for another batch are left for `state_at` to refuse."""
    then, data = json.loads((resumed / resume.MANIFEST).read_text())["dp"], resume.read_state(resumed)["data"]
    saved, now = data.get("sequences_per_step"), groups.dp_size()
    if (
        saved is None
        or now == then == data.get("dp", then)
        or args.global_batch_size is not None
        or args.sequences_per_step(now) == saved
    ):
        return args
    count = micro_batches(saved, args.batch_size, now)
    log.say(
        f"{now} data-parallel rank(s), {data.get('dp', then)} when it was begun: the same {saved} sequences a step in {count} micro batch(es)",
        groups.rank(),
    )
    return dataclasses.replace(args, global_batch_size=saved)


def with_config_keys(tuning: TuningArgs, files: list[str]) -> TuningArgs:
    """Tuning keys in --llama_config files are the flags' defaults; a flag that was written out wins."""
    keys = {k: v for k, v in tuning_keys(read_params(files)).items() if k not in tuning.given}
    if not keys:
        return tuning
    for name in ("lora_targets", "modules_to_save"):
        if isinstance(keys.get(name), str):
            keys[name] = [part for part in keys[name].split(",") if part]
    keys["lora_rank"] = max(0, keys.get("lora_rank", tuning.lora_rank))  # Accessory writes -1 for none
    changed = dataclasses.replace(tuning, **keys)
    changed.given = tuning.given | keys.keys()  # type: ignore[attr-defined]
    return changed


def check_carried(run: RunArgs, checkpoint: Any, tuning: TuningArgs) -> None:
    """Adapters inside the checkpoint go on at their own rank and scale, or not at all. Raises ValueError with the remedy."""
    if checkpoint.adapter is None:
        return
    merge = f"merge it first: python tools/merge_lora.py --adapters {run.pretrained_path} --dst DIR"
    if is_adapter(Path(run.pretrained_path)):
        raise ValueError(
            f"--pretrained_path {run.pretrained_path} is an adapter, not a model: give its base, and --lora_path {run.pretrained_path} to train on, or {merge}"
        )
    rank, alpha = checkpoint.adapter["lora_rank"], checkpoint.adapter["lora_alpha"]
    if tuning.lora_rank != rank or tuning.alpha != alpha:
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
    return Tokenizer.open_for(path, args.vocab_size, run.pretrained_path or "--llama_config (its vocab_size)")


def calibration_tokens(parallel: ParallelArgs, args: ModelArgs, as_test: bool) -> int:
    """How many training tokens decide the rounding under --quant; 0: none do."""
    if parallel.quant is None:
        return 0
    widest = max(args.dim, args.ffn_dim, args.n_heads * args.head_size)
    wanted = 4 * widest if parallel.calibration_tokens is None else parallel.calibration_tokens
    return min(wanted, AS_TEST_TOKENS) if as_test else wanted


def materialise(
    model: Transformer, checkpoint: Any, parallel: ParallelArgs, seed: int, calibrate_on: Sequence[Batch] | None = None
) -> None:
    """Fills the empty model and shards it, layer by layer: weights -> rounding under --quant -> checkpointing -> compile -> FSDP."""
    shard = sharder(parallel.data_parallel, parallel.precision, parallel.cpu_offload)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    if parallel.compile:  # graphs are shared by the layers, not by training, validation, packed and single sequences
        torch._dynamo.config.recompile_limit = 64
        torch._functorch.config.activation_memory_budget = (
            SELECTIVE_BUDGET if parallel.checkpointing == "selective" else 1.0
        )

    model.sequence_parallel = parallel.sequence_parallel

    def after_block(layer: torch.nn.Module) -> None:
        layer.checkpointing = parallel.checkpointing
        if parallel.compile:
            # not the whole layer: around checkpoint() any graph break would leave all of it uncompiled
            layer.compute = torch.compile(layer.compute)
        shard(layer, cast=not packed_weights(layer))

    dtype_of = lambda name: torch.float32 if name in trains else None  # noqa: E731  masters fp32, the frozen as in the file
    show_progress = groups.rank() == 0
    fill(model, checkpoint, dtype_of, groups.device(), seed, after_block, show_progress, calibrate_on)
    shard(model)


def changed_flags(run: Path, data: Any) -> str:
    """Which of the data's flags are not what the run in this directory had, as far as its config.json tells."""
    try:
        before = dict(json.loads((run / "config.json").read_text())[type(data).__name__])
    except (OSError, ValueError, KeyError, TypeError):
        return f"or the tokenizer, or data flags: {run / 'config.json'} does not tell"
    now, free = dataclasses.asdict(data), ("num_workers", "preview")
    changed = [f"--{k} {before[k]} then, {v} now" for k, v in now.items() if before.get(k, v) != v and k not in free]
    return "; ".join(changed) or "its files or the tokenizer, not its flags"


def model_terms(args: ModelArgs, tuning: TuningArgs) -> dict[str, Any]:
    """What a model computes beyond names and shapes of its tensors, as plain JSON: a run that goes on must have the same."""
    terms: dict[str, Any] = args.to_dict()
    if tuning.lora_rank:
        terms |= {"lora_rank": tuning.lora_rank, "lora_alpha": tuning.alpha, "use_rslora": tuning.use_rslora}
        terms |= {"rank_pattern": tuning.rank_pattern, "alpha_pattern": tuning.alpha_pattern}
    return json.loads(json.dumps(terms))


def state_at(path: Path, position: dict[str, Any], data: Any) -> TrainState:
    """Where the checkpoint `path` stands; its weights and moments are `resume.load`'s. Raises ValueError when the order of
    samples would differ, with the flags among `data` that are not what they were."""
    saved = resume.read_state(path)
    state = TrainState.from_json({k: v for k, v in saved.items() if k in TrainState.__dataclass_fields__})
    told = json.loads((path / resume.MANIFEST).read_text())
    position["dp"] = state.data.get("dp", told["dp"])  # the flags of the batch are still meant for as many
    if state.data.get("fingerprint") != position["fingerprint"]:
        raise ValueError(
            f"--resume {path}: the training data changed ({changed_flags(path.parent, data)}): restore it, or start anew in another --output_dir"
        )
    named = {
        "seed": "--seed",
        "sequences_per_step": "the batch (--batch_size x --accum_iter x data-parallel ranks, or --global_batch_size)",
        "quant": "--quant",
        "calibration_tokens": "--calibration_tokens",
    }
    changed = [(name, state.data.get(key), position.get(key)) for key, name in named.items()]
    before, now = state.data.get("model", position["model"]), position["model"]
    changed += [(f"the model's {key}", before.get(key), now.get(key)) for key in before | now]
    for name, then, value in changed:
        if then != value:
            raise ValueError(
                f"--resume {path}: {name} changed ({then} then, {value} now): restore it, or start anew in another --output_dir"
            )
    if state.data.get("validation", position["validation"]) != position["validation"] and state.best is not None:
        log.say("the validation data changed: what was best by the earlier one counts no more", groups.rank())
        state.forget_best()
    if position.get("calibration_tokens"):
        then, now = f"{told['mp']} x {told['dp']}", f"{groups.mp_size()} x {groups.dp_size()}"
        if then != now:
            log.say(
                f"the 4-bit base is rounded anew on {now} ranks (model x data parallel; {then} when it was saved) and will differ: the loss may jump. Go on with as many as then, or begin with --calibration_tokens 0",
                groups.rank(),
            )
    if (then := state.data.get("optim_states", "fp32")) != position["optim_states"]:
        log.say(
            f"the moments were {then} until now, they go on as --optim_states {position['optim_states']}", groups.rank()
        )
    return state
