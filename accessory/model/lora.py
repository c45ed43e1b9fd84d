"""LoRA inside the parallel linears, and which parameters train.

    column (wq wk wv w1 w3):  y = W x + s B A x     A [r, in] replicated,      B [out/mp, r]   A's gradient is this rank's addend
    row    (wo w2):           y = sum(W x + s B A x)  A [r, in/mp],            B [out, r] replicated, B's gradient an addend

s = alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (rank-stabilised: Kalajdzievski 2023). Rank and alpha may differ from
one linear to the next: `TuningArgs.rank_of` and `scale_of` are the one place that knows. The row layer's low-rank addend joins
the one all-reduce it makes anyway. Addends are summed over mp once a step: `partial_grad` names them, parallel/grads.py sums.
W may be held in NF4 (quant.py, QLoRA): `packed`. A linear and its adapter are one autograd function (lora_function.py). Proof: tests/dist/test_parity.py, tests/dist/test_quant.py.
"""

import contextlib
import difflib
import hashlib
import math
from collections import Counter
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.flags import COLUMN, LINEARS, ROW, TuningArgs, linear_of, matches
from accessory.model import quant
from accessory.model.args import TUNING_KEYS
from accessory.model.lora_function import lora_linear
from accessory.parallel.derivatives import by_hand
from accessory.parallel.layers import ColumnParallelLinear, RowParallelLinear, linear


class LoRA:
    """What both linears share: the adapter's two matrices as submodules, so that names read `wq.lora_a.weight`."""

    def __init__(self, *sizes: int, bias: bool = False):
        super().__init__(*sizes, bias=bias)
        self.lora_a: nn.Linear | None = None
        self.lora_b: nn.Linear | None = None
        self.lora_scale, self.lora_dropout, self.lora_on = 0.0, 0.0, True
        self.packed: quant.Layout | None = None  # W is held in NF4: `weight` is its flat packed tensor
        self.table: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]  # quant.tables on W's device

    def add_lora(self, rank: int, scale: float, dropout: float) -> None:
        """Adds empty (meta) adapters of this rank's slice sizes; `initial_value` or a file fills them."""
        out_features, in_features = self.weight.shape  # this rank's slice
        self.lora_a = nn.Linear(in_features, rank, bias=False, device="meta")
        self.lora_b = nn.Linear(rank, out_features, bias=False, device="meta")
        self.lora_scale, self.lora_dropout = scale, dropout

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: (.., in) -> (.., out) of this rank's slices."""
        if self.packed is None:
            return linear(x, self.weight, bias)
        y = quant.linear(x, self.weight, self.packed, self.table)
        return y if bias is None else y + bias.to(y.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """s B A x: (.., in) -> (.., out) of this rank's slices."""
        x = F.dropout(x, self.lora_dropout, self.training)
        return linear(linear(x, self.lora_a.weight), self.lora_b.weight) * self.lora_scale

    def adapted(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b + s B A x, whether or not there is an adapter: (.., in) -> (.., out) of this rank's slices."""
        if self.lora_a is None or not self.lora_on:
            return self.product(x, bias)
        if not by_hand() or torch.is_autocast_enabled(x.device.type):
            return self.product(x, bias) + self.low_rank(x)  # compiled, the passes become one by themselves
        a, b = self.lora_a.weight, self.lora_b.weight
        dropout = self.lora_dropout if self.training else 0.0
        packed = None if self.packed is None else (self.packed, self.table)
        return lora_linear(x, self.weight, bias, a, b, self.lora_scale, dropout, packed)


class ColumnLinear(LoRA, ColumnParallelLinear):
    """Column-parallel linear with room for an adapter. x: replicated, already through `copy_to_mp`."""

    def forward(self, x: Tensor) -> Tensor:  # (.., in) -> (.., out/mp)
        return self.adapted(x, self.bias)


class RowLinear(LoRA, RowParallelLinear):
    """Row-parallel linear with room for an adapter. x: this rank's slice of the features; y: replicated."""

    def partial(self, x: Tensor) -> Tensor:  # (.., in/mp) -> (.., out), an addend
        return self.adapted(x)


def partial_grad(name: str) -> bool:
    """Whether this parameter is replicated while each mp rank's backward gives only its addend of the gradient."""
    parts = name.split(".")
    if "lora_a" in parts:
        return parts[-3] in COLUMN
    if "q_norm" in parts or "k_norm" in parts:  # a rank's is that of its own heads (and of copies, by its own queries)
        return True
    return "lora_b" in parts and parts[-3] in ROW


def folded(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """{linear: value} of all linears as the patterns that `rank_of` reads: each kind's commonest value, unless it is the
    default, and the exceptions by their full names."""
    patterns: dict[str, Any] = {}
    for kind in dict.fromkeys(n.rsplit(".", 1)[-1] for n in values):
        mine = {n: v for n, v in values.items() if n.rsplit(".", 1)[-1] == kind}
        [(common, _)] = Counter(mine.values()).most_common(1)
        patterns |= ({kind: common} if common != default else {}) | {n: v for n, v in mine.items() if v != common}
    return patterns


def saved_terms(model: nn.Module, tuning: TuningArgs) -> dict[str, Any]:
    """What adapter.json keeps of this run: the flags with alpha spelt out, and how the base was held (`quant`); under
    --trainable what its choice left of them, so that the terms say exactly what the file (`saved_names`) holds."""
    terms = {k: getattr(tuning, k) for k in TUNING_KEYS} | {"lora_alpha": tuning.alpha}
    if packed_weights(model):
        terms["quant"] = "nf4"
    if not tuning.trainable:
        return terms
    saved = saved_names(model, tuning)
    lora = {linear_of(n) for n in saved if ".lora_" in n}
    full = [n for n in saved if ".lora_" not in n and not (tuning.bias_tuning and n.endswith(".bias"))]
    ranks = {n: tuning.rank_of(n) if n in lora else 0 for n, _ in linears(model)}
    return terms | {
        "lora_rank": tuning.lora_rank if lora else 0,
        "rank_pattern": folded(ranks, tuning.lora_rank) if lora else {},
        "modules_to_save": full,
        "norm_tuning": False,
    }


def saved_names(model: nn.Module, tuning: TuningArgs) -> list[str]:
    """What an adapter file holds: the trained parameters, the other half of a half trained LoRA, and every added bias."""
    lora = {linear_of(n) for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}

    def belongs(name: str) -> bool:
        return linear_of(name) in lora if ".lora_" in name else tuning.bias_tuning and name.endswith(".bias")

    return [n for n, p in model.named_parameters() if p.requires_grad or belongs(n)]


def linears(model: nn.Module, targets: list[str] | tuple[str, ...] = LINEARS):
    """(name, linear) for every layer's linear of these kinds, in order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRA) and n.rsplit(".", 1)[-1] in targets]


def packed_weights(model: nn.Module) -> dict[str, LoRA]:
    """{name of the weight: its linear} of those held in NF4: parameters that are not numbers one may read or save."""
    return {f"{n}.weight": m for n, m in linears(model) if m.packed is not None}


def add_tuning(model: nn.Module, tuning: TuningArgs) -> None:
    """Adds what fine-tuning needs beside the checkpoint's weights: adapters, and biases where there are none. To a model that is
    on meta, empty; to one with weights, in fp32 and as they begin, so that the result is at first the same. Raises ValueError where
    there are adapters already: new ones would take their place, and what they learnt would be lost in silence."""
    if tuning.lora_rank and any(module.lora_a is not None for _, module in linears(model)):
        raise ValueError("the model has adapters already: mark_trainable alone trains them on; load it anew for others")
    for name, module in linears(model):
        if rank := tuning.rank_of(name):
            module.add_lora(rank, tuning.scale_of(name), tuning.lora_dropout)
        if tuning.bias_tuning and module.bias is None:
            module.bias = nn.Parameter(torch.empty(module.weight.shape[0], device="meta"))
    loaded = [p for p in model.parameters() if not p.is_meta]
    if loaded:
        from accessory.model.llama import set_parameter

        for name in [n for n, p in model.named_parameters() if p.is_meta]:
            set_parameter(model, name, initial_value(model, name, seed=0).to(loaded[0].device))


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While it is entered the adapters add nothing: the base as a reference, for DPO or a KL term. What is trained in full beside
    them stays as it is. No gradients are taken meanwhile: what checkpointing makes again in backward would have them."""
    adapted = [module for _, module in linears(model) if module.lora_on]
    try:
        for module in adapted:
            module.lora_on = False
        with torch.no_grad():
            yield
    finally:
        for module in adapted:
            module.lora_on = True


def initial_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """This rank's part of a parameter that no file gives: A as PEFT starts it (Kaiming, a = sqrt 5), B and biases zero, a
    model's own weights as `Transformer.init_weights` has them.

    Drawn from (seed, name) for the whole matrix and then cut, so every mp rank and every layout starts equal."""
    from accessory.model.llama import local_slice  # one rule for cutting

    if ".lora_b." in name or name.endswith(".bias"):
        return torch.zeros(model.get_parameter(name).shape)
    if ".lora_a." not in name:
        return model.drawn(name, seed)
    return local_slice(model, name, lambda shape: _kaiming(name, shape, seed))


def _kaiming(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(named_seed(seed, name))
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / (1 + 5) / fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed from (seed, name): the same on every machine and in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def mark_trainable(model: nn.Module, tuning: TuningArgs) -> list[str]:
    """Sets requires_grad on every parameter and returns the trained names, in the model's order.

    Raises ValueError for a name that matches nothing and for an empty set."""
    names = [n for n, _ in model.named_parameters()]
    tied = {} if "output.weight" in names else {"output": "tok_embeddings", "output.weight": "tok_embeddings.weight"}
    wanted = [tied.get(p, p) for p in tuning.trainable if not p.startswith("!")]
    frozen = [tied.get(p[1:], p[1:]) for p in tuning.trainable if p.startswith("!")]
    saved = [tied.get(m, m) for m in tuning.modules_to_save]
    for flag_name, patterns in (("trainable", wanted + frozen), ("modules_to_save", saved)):
        for pattern in patterns:
            if not any(matches(n, pattern) for n in names):
                near = difflib.get_close_matches(pattern, names + sorted({p for n in names for p in n.split(".")}), n=1)
                raise ValueError(
                    f"--{flag_name} {pattern}: no parameter matches" + (f"; did you mean {near[0]}?" if near else "")
                )
    if wanted:
        chosen = [n for n in names if any(matches(n, p) for p in wanted)]
    elif tuning.lora_rank or tuning.bias_tuning or tuning.norm_tuning or saved:
        chosen = [n for n in names if _tuned(n, tuning, saved)]
    else:
        chosen = names
    chosen = [n for n in chosen if not any(matches(n, p) for p in frozen)]
    if not chosen:
        raise ValueError(f"--trainable {','.join(tuning.trainable)}: nothing is left to train")
    keep = set(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in keep)
    return chosen


def _tuned(name: str, tuning: TuningArgs, saved: list[str]) -> bool:
    if ".lora_" in name:
        return True
    if name.endswith(".bias"):
        return tuning.bias_tuning or any(matches(name, m) for m in saved)
    if "norm." in name and tuning.norm_tuning:
        return True
    return any(matches(name, m) for m in saved)
