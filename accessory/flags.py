"""What a run is told: the flags of main_finetune and main_pretrain, but for those of their data (data/sft.py, data/blocks.py).

No torch, here and in what this imports: --help and a wrong flag are answered at once, not after the seconds that torch takes.
Test: tests/unit/test_config.py
"""

import fnmatch
import math
import re
from dataclasses import dataclass, fields
from typing import Any

from accessory import log
from accessory.config import FALSE, TRUE, flag

PRECISIONS = ("bf16", "fp16", "fp32", "tf32")
CHECKPOINTING = ("none", "selective", "full", "auto")
OPTIM_STATES = ("fp32", "bf16", "int8")
SCHEDULES = ("cosine", "linear", "constant", "polynomial", "cosine_with_restarts", "wsd")
COLUMN, ROW = ("wq", "wk", "wv", "w1", "w3"), ("wo", "w2")
LINEARS = COLUMN + ROW
TEST_MICRO_BATCHES = 2  # of --as_test, on each rank: two, so that gradients add up once


@dataclass
class RunArgs:
    """The run: what it starts from and what it leaves"""

    pretrained_path: str = flag(
        "",
        "directory (or .gguf) of the checkpoint to start from, in any format that is read; a,b,c: b and c are laid over a",
    )
    pretrained_type: str | None = flag(
        None, "insist on this format; none: recognised", choices=("meta_ori", "consolidated", "hf", "gguf")
    )
    lora_path: str | None = flag(
        None, "an adapter, ours or PEFT's, that is trained on; its rank, scale and targets hold"
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
    keep_best_n: int = flag(1, "with keep_best: so many best ones, of equal ones the earlier")
    only_save_trainable: bool | None = flag(
        None, "save an adapter, or all weights (false); none: an adapter if anything is frozen"
    )
    embedding_dim: int = flag(
        0, "how saved shards split tok_embeddings: 0 vocabulary (Llama 3), 1 features (Llama 1 and 2)"
    )
    sample_prompts: str | None = flag(
        None, "an instruction, or a text file with one on each line, answered at every validation"
    )
    report_to: list[str] = flag(
        ["tensorboard"], "beside metrics.jsonl; several with commas", choices=("none", *log.REPORTERS)
    )
    dry_run: bool = flag(False, "print the plan (parameters, memory, steps, tokens) and stop")

    def __post_init__(self) -> None:
        if not self.pretrained_path and not self.llama_config:
            raise ValueError("--pretrained_path is missing: name a directory")
        if not self.output_dir and not self.dry_run:
            raise ValueError("--output_dir is missing: name a directory")
        if self.embedding_dim not in (0, 1):
            raise ValueError(f"--embedding_dim {self.embedding_dim}: 0 or 1")
        if self.keep_best_n < 1:
            raise ValueError(f"--keep_best_n {self.keep_best_n}: at least 1, or --keep_best false")
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"--report_to {','.join(self.report_to)}: none stands alone")
        log.check_reporters(self.report_to)
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"--save_total_limit {self.save_total_limit}: at least 1, the only whole checkpoint is never deleted"
            )


@dataclass
class ParallelArgs:
    """How the work is divided, and in which precision"""

    model_parallel_size: int = flag(
        1, "ranks that share one replica; any size the model's heads allow, whatever the shards on disk"
    )
    data_parallel: str = flag(
        "fsdp",
        "over the other ranks: fsdp least memory, sdp keeps a step's weights, ddp keeps all",
        choices=("fsdp", "sdp", "ddp"),
    )
    cpu_offload: bool = flag(False, "keep weights and optimizer in host memory between uses (GPU only)")
    precision: str = flag(
        "bf16", "of the arithmetic; trained weights and gradients are fp32 always", choices=PRECISIONS
    )
    sequence_parallel: bool = flag(
        False, "the ranks of a replica share the tokens too, wherever they share no weight: 1/mp of the activations"
    )
    checkpointing: str | bool = flag(
        "none",
        "recompute in backward: none; selective, only what is cheap; full, whole layers (least memory, about a third more "
        "time); auto, the first of these that fits into memory; true is full, false is none",
    )
    compile: bool = flag(False, "compile each layer with torch.compile: faster after a minute of warming up")
    quant: str | None = flag(
        None, "hold the layers' frozen linears in 4 bits (QLoRA): a quarter of their memory", choices=("nf4",)
    )
    calibration_tokens: int | None = flag(
        None,
        "with quant: so many training tokens decide how weights are rounded (GPTQ); none: four for each input of the widest "
        "linear; 0: each to its nearest level, which is at once and worse",
    )

    def __post_init__(self) -> None:
        given = str(self.checkpointing).lower()  # "none" arrives as None
        self.checkpointing = "none" if given in FALSE else "full" if given in TRUE else given
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"--checkpointing {given}: choose one of {', '.join(CHECKPOINTING)}, true (full), false (none)"
            )
        if self.calibration_tokens is not None and self.calibration_tokens < 0:
            raise ValueError(f"--calibration_tokens {self.calibration_tokens}: 0 or more")
        if self.calibration_tokens and self.quant is None:
            raise ValueError(
                f"--calibration_tokens {self.calibration_tokens} is for --quant nf4: add it, or leave it out"
            )


@dataclass
class TuningArgs:
    """What is trained"""

    lora_rank: int = flag(
        0, "rank of the LoRA adapters; 0: no LoRA, everything is trained unless another flag says less"
    )
    lora_alpha: float | None = flag(None, "LoRA's scale is lora_alpha / lora_rank; none: lora_rank, a scale of 1")
    lora_dropout: float = flag(0.0, "dropout on the adapters' input")
    lora_targets: list[str] = flag(LINEARS, "which linears get an adapter", choices=LINEARS)
    modules_to_save: list[str] = flag([], "modules trained in full beside the adapters, e.g. tok_embeddings,output")
    use_rslora: bool = flag(
        False, "scale by lora_alpha / sqrt(lora_rank) instead, for large ranks (rank-stabilised LoRA)"
    )
    rank_pattern: dict[str, int] = flag({}, "other ranks for some linears, e.g. w2=16,layers.0=4; 0: no adapter there")
    alpha_pattern: dict[str, float] = flag({}, "other alphas for some linears, e.g. layers.*.attention.wq=32")
    bias_tuning: bool = flag(False, "give the seven linears biases (zero at first) and train them")
    norm_tuning: bool = flag(False, "train the norms")
    trainable: list[str] = flag(
        [], "train exactly the parameters matching these names or globs; a leading ! freezes, e.g. '!layers.0'"
    )

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: expected 0 (none) or more")
        if wrong := [f"{k}={v}" for k, v in self.rank_pattern.items() if int(v) != v or v < 0]:
            raise ValueError(f"--rank_pattern {wrong[0]}: expected a whole number, 0 (none) or more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: expected 0 or more, below 1")
        if self.lora_rank and not self.lora_targets:
            raise ValueError(
                f"--lora_targets is empty with --lora_rank {self.lora_rank}: name some of {', '.join(LINEARS)}"
            )

    @classmethod
    def from_terms(cls, terms: dict[str, Any]) -> "TuningArgs":
        """From adapter.json's content or a checkpoint's `adapter`; keys that are no flags are passed over."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in terms.items() if k in names and v is not None})

    @property
    def alpha(self) -> float:
        return float(self.lora_rank if self.lora_alpha is None else self.lora_alpha)

    def rank_of(self, name: str) -> int:
        """The rank of the adapter on this linear (`layers.3.attention.wq`, or one of its weights' names); 0: it has none."""
        linear = linear_of(name)
        if not self.lora_rank or linear.rsplit(".", 1)[-1] not in self.lora_targets:
            return 0
        return int(_by_pattern(self.rank_pattern, linear, self.lora_rank))

    def scale_of(self, name: str) -> float:
        """What B A x of this linear is multiplied by; 0 where it has no adapter."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank) if rank else 0.0

    def alpha_of(self, name: str) -> float:
        return float(_by_pattern(self.alpha_pattern, linear_of(name), self.alpha))

    @property
    def partly(self) -> bool:
        """Whether something is frozen: the base then stays in the file's dtype and only the trained part is saved."""
        return bool(self.lora_rank or self.bias_tuning or self.norm_tuning or self.modules_to_save or self.trainable)


def linear_of(name: str) -> str:
    """layers.0.attention.wq.lora_a.weight, or ...wq.weight, or ...wq.bias -> layers.0.attention.wq"""
    return re.sub(r"(\.lora_[ab])?(\.weight|\.bias)?$", "", name)


def _by_pattern(patterns: dict[str, Any], linear: str, default: Any) -> Any:
    """The value of the longest matching pattern (of equals the first by name): no order, since JSON files are sorted."""
    matching = sorted((p for p in patterns if matches(linear, p)), key=lambda p: (-len(p), p))
    return patterns[matching[0]] if matching else default


def matches(name: str, pattern: str) -> bool:
    """A glob over the whole name, or a run of its dotted parts: 'layers.0', 'attention.wq', 'norm', 'layers.*.wq.weight'."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


@dataclass
class OptimArgs:
    """Optimizer and schedule"""

    lr: float = flag(2e-5, "peak learning rate")
    min_lr: float = flag(0.0, "floor of the schedule")
    lr_scheduler: str = flag("cosine", "shape after the warm-up", choices=SCHEDULES)
    warmup_ratio: float = flag(0.03, "share of all steps that warms up; --warmup_steps wins")
    warmup_steps: int | None = flag(None, "steps that warm up, instead of a share")
    weight_decay: float = flag(0.0, "AdamW's decay, on matrices only")
    adam_betas: list[float] = flag([0.9, 0.95], "AdamW's two betas")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    clip_grad: float = flag(1.0, "largest norm of the whole gradient; 0: no clipping")
    optim_states: str = flag(
        "fp32", "AdamW's moments: bf16 halves their memory, int8 quarters it", choices=OPTIM_STATES
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--min_lr {self.min_lr} with --lr {self.lr}: expected 0 <= min_lr <= lr")
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ValueError(
                f"--adam_betas {','.join(map(str, self.adam_betas))}: expected two numbers, 0 or more and below 1"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio}: expected a share between 0 and 1")
        if (self.warmup_steps or 0) < 0 or self.clip_grad < 0 or self.weight_decay < 0:
            raise ValueError("--warmup_steps, --clip_grad and --weight_decay cannot be negative")

    def warmup(self, max_steps: int) -> int:
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(max_steps * self.warmup_ratio)


@dataclass
class LoopArgs:
    """The loop"""

    batch_size: int = flag(4, "sequences per data-parallel rank in one micro batch")
    eval_batch_size: int | None = flag(None, "the same for validation; none: batch_size")
    accum_iter: int = flag(1, "micro batches per optimizer step")
    global_batch_size: int | None = flag(
        None,
        "sequences per optimizer step over all ranks; wins over accum_iter. none: batch_size x accum_iter x data-parallel ranks",
    )
    epochs: int = flag(3, "passes over the training data")
    max_steps: int | None = flag(None, "optimizer steps, instead of epochs")
    logging_steps: int = flag(1, "a metrics.jsonl line every so many steps")
    eval_steps: float = flag(
        0,
        "validate every so many steps; below 1: a share of the run; 0: after each epoch. Always at step 0 and at the end",
    )
    save_steps: float = flag(
        0, "save every so many steps; below 1: a share of the run; 0: after each epoch. Always at the end"
    )
    metric: str = flag(
        "val_loss", "what the best checkpoint is judged by", choices=("val_loss", "val_perplexity", "val_accuracy")
    )
    early_stop_patience: int | None = flag(
        None, "stop after so many validations in a row in which --metric did not improve; none: never"
    )
    stop_perplexity: float | None = flag(
        None, "stop at the first validation after step 0 whose val_perplexity is this or less; none: never"
    )
    sample_steps: float = flag(
        0, "answer --sample_prompts every so many steps; below 1: a share of the run; 0: with each validation"
    )
    as_test: bool = flag(
        False,
        "try everything once, in output_dir/as_test: one step, validation on a few batches, a sample, a checkpoint",
    )
    seed: int = flag(0, "of the data's order, dropout and new weights")
    share_prompts: bool = flag(
        True,
        "the tokens with which prompts of a micro batch begin alike go through the layers once; false: each by itself, for "
        "comparison",
    )
    profile_steps: str | None = flag(
        None,
        "first:last, steps from 1: what every kernel of them took, as a trace in output_dir/profile; none: no trace",
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "accum_iter", "epochs", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        for name in ("eval_batch_size", "max_steps", "global_batch_size", "early_stop_patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more, or none")
        if self.eval_steps < 0 or self.save_steps < 0 or self.sample_steps < 0:
            raise ValueError("--eval_steps, --save_steps and --sample_steps cannot be negative")
        if self.stop_perplexity is not None and self.stop_perplexity < 1:
            raise ValueError(f"--stop_perplexity {self.stop_perplexity}: a perplexity is never below 1, or none")
        if self.profile_steps is not None:
            parse_steps(self.profile_steps)

    def sequences_per_step(self, dp_size: int) -> int:
        whole = self.global_batch_size or self.batch_size * self.accum_iter * dp_size
        return min(whole, self.batch_size * TEST_MICRO_BATCHES * dp_size) if self.as_test else whole

    def total_steps(self, windows: int) -> int:
        return 1 if self.as_test else self.max_steps if self.max_steps is not None else self.epochs * windows

    def ends_early(self, state: Any) -> str | None:
        """Why a run in this state is over before its last step; None where it goes on."""
        if not state.validated_at:  # nor does the untouched model's validation end it
            return None
        if self.early_stop_patience is not None and state.metric == self.metric:
            if state.stale >= self.early_stop_patience:
                return f"{self.metric} has not improved for {state.stale} validation(s), --early_stop_patience {self.early_stop_patience}"
        if self.stop_perplexity is not None:
            if (perplexity := state.metrics["val_perplexity"]) <= self.stop_perplexity:
                return f"val_perplexity is {perplexity:.4f}, --stop_perplexity {self.stop_perplexity:g}"
        return None


def parse_steps(text: str) -> tuple[int, int]:
    """(first, last) of --profile_steps. Raises ValueError."""
    found = re.fullmatch(r"(\d+):(\d+)", str(text))
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--profile_steps {text}: expected first:last, steps counted from 1, such as 3:5")
    return int(found[1]), int(found[2])
