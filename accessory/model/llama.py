"""One LLaMA: Llama 1 to 3.2, Code Llama, TinyLlama, SmolLM2, Mistral-7B, Qwen2, Qwen2.5 and Qwen3, by configuration, tensor
parallel throughout.

    tokens -> tok_embeddings -> [ x + wo(attend(wq wk wv norm(x))) -> x + w2(silu(w1) * w3)(norm(x)) ] * n_layers -> norm -> output

Column-parallel wq wk wv w1 w3 output, row-parallel wo w2, vocab-parallel embedding: two all-reduces a layer forward, two
backward; with `sequence_parallel` a reduce-scatter and an all-gather in the place of each, and between them, around the norms,
x (B, T, D) is x (N/mp, D): this rank's share of the N = B T tokens. Built on the meta device, filled by `from_pretrained` or
`init_weights`. With labels, the loss is computed inside `forward`, where FSDP's hooks are. Names and rotary layout are Meta's. Qwen2 has biases on wq wk wv (`qkv_bias`), Qwen3 an RMSNorm
over each head of q and k before the rotary embedding (`qk_norm`). Proof: tests/unit/test_llama.py, tests/dist/test_parity.py,
tests/dist/test_families.py.

Shapes: B batch, T tokens, D dim, H query heads, K kv heads, Dh head dim, F ffn, V vocab, /mp = this rank's slice.
"""

from functools import partial
from typing import Any, Callable, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from accessory.model import rope
from accessory.model.args import ModelArgs, check_model_parallel
from accessory.model.attention import Segments, attend, segments
from accessory.model.checks import check_positions, check_tokens, check_window
from accessory.model.lora import COLUMN, LINEARS, ColumnLinear, LoRA, RowLinear, named_seed
from accessory.model.norm import RMSNorm
from accessory.model.recompute import Remade
from accessory.model.swiglu import swiglu
from accessory.model.targets import Targets, only, targets_of
from accessory.parallel import groups
from accessory.parallel.derivatives import over_mp, transformed
from accessory.parallel.layers import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_mp,
    gather_from_mp,
    gather_rows,
    gather_tokens,
    linear,
    vocab_range,
)
from accessory.parallel.loss import linear_cross_entropy

# On which dim each weight is split over mp; a bias follows its weight's dim 0. The only place that knows.
SHARD_DIM: dict[str, int | None] = {
    **dict.fromkeys(("tok_embeddings", "wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
    **dict.fromkeys(("attention_norm", "ffn_norm", "norm", "q_norm", "k_norm"), None),
}


def shard_dim(name: str) -> int | None:
    """On which dim the parameter of this name (`layers.3.attention.wq.weight`) is split over mp; None: replicated.

    Raises ValueError for a name no LLaMA has."""
    parts = name.split(".")
    module = (
        parts[-3] if len(parts) > 2 and parts[-2] in ("lora_a", "lora_b") else parts[-2] if len(parts) > 1 else name
    )
    if module not in SHARD_DIM:
        raise ValueError(f"{name}: not a parameter of a LLaMA")
    dim = SHARD_DIM[module]
    if parts[-2] in ("lora_a", "lora_b"):  # A is cut with the inputs, B with the outputs
        return dim if (parts[-2] == "lora_b") == (dim == 0) else None
    return dim if parts[-1] == "weight" or dim == 0 else None


def replicated(name: str) -> bool:
    """Whether every mp rank holds all of this parameter. Under sequence parallel the gradient of each such one is an addend:
    a norm or a row layer's bias sees this rank's tokens only, and lora_a, lora_b, q_norm, k_norm are addends anyway."""
    return shard_dim(name) is None


class Cache(Protocol):
    """Keys and values of the tokens so far; generation/engine.py has the one implementation."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores (B, T, K/mp, Dh) of a layer; returns all keys, all values (B, S, K/mp, Dh) and the mask (B, 1, T, S)."""


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads. At mp > n_kv_heads neighbouring ranks hold copies of one kv head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_size = args.head_size
        kv_heads = max(args.kv_heads, groups.mp_size())  # one per rank, copies counted
        qkv_bias = args.attention_bias or args.qkv_bias
        self.wq = ColumnLinear(args.dim, args.n_heads * args.head_size, bias=qkv_bias)
        self.wk = ColumnLinear(args.dim, kv_heads * args.head_size, bias=qkv_bias)
        self.wv = ColumnLinear(args.dim, kv_heads * args.head_size, bias=qkv_bias)
        self.wo = RowLinear(args.n_heads * args.head_size, args.dim, bias=args.attention_bias)
        self.q_norm = RMSNorm(args.head_size, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_size, args.norm_eps) if args.qk_norm else None

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        packed: Segments | None,
        cache: Cache | None,
        layer: int,
        divided: bool,
        rows: Tensor | None = None,
        keeps: bool = False,
    ) -> Tensor:
        """x: all tokens, already through `copy_to_mp` or `gather_tokens`, once for the three. -> (B, T, D), with `divided`
        (N/mp, D), with `rows` (1, M, D). `keeps`: memory may be spent on speed."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_size)) for w in (self.wq, self.wk, self.wv))  # (B, T, H|K/mp, Dh)
        if self.q_norm is not None:  # one weight for all heads: this rank's gradient is that of its own heads
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)
        # little beside gradients and moments; who trains an adapter alone has none to spare
        keeps = keeps and torch.is_grad_enabled() and self.wq.weight.requires_grad
        y = only(attend(q, k, v, packed, mask, keeps).flatten(2), rows)
        return self.wo.divided(y) if divided else self.wo(y)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = ColumnLinear(args.dim, args.ffn_dim, bias=args.mlp_bias)
        self.w2 = RowLinear(args.ffn_dim, args.dim, bias=args.mlp_bias)
        self.w3 = ColumnLinear(args.dim, args.ffn_dim, bias=args.mlp_bias)

    def forward(self, x: Tensor, divided: bool = False, remade: Remade | None = None) -> Tensor:
        """As Attention's. `remade`: what is between the products is made again in backward."""
        gate, up = self.w1(x), self.w3(x)  # (B, T, F/mp)
        y = swiglu(gate, up)
        if remade is not None:
            a, b = gate.detach(), up.detach()
            remade.note(y, lambda: swiglu(a, b))  # before the product that wants it
        return self.w2.divided(y) if divided else self.w2(y)


class Block(nn.Module):
    """One layer. `checkpointing`, what is kept for backward; names do not change with it:

    none        all that autograd wants; under sequence parallel the columns' input as this rank's share, gathered again
    selective   the products' results and attention's: norms and silu are taken again, nothing dear, no sum over mp
    full        x only"""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.checkpointing = "none"
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        packed: Segments | None = None,
        cache: Cache | None = None,
        index: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`index`: where in the cache this layer's keys are; told by the model, whose layers may be moved and repeated. `rows`:
        see `compute`."""
        if cache is not None:  # never compiled: the cache would make one more graph of every layer
            return self._compute(x, turns, packed, cache, None, index)
        if self.checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint(self.compute, x, turns, packed, rows, use_reentrant=False)
        return self.compute(x, turns, packed, rows)

    def compute(self, x: Tensor, turns: Tensor, packed: Segments | None, rows: Tensor | None = None) -> Tensor:
        """x (B, T, D), or under sequence parallel (N/mp, D); the result alike. With `rows`, (M,) among the B T tokens, of these
        alone, (1, M, D): what comes after attention is then computed for no other."""
        keeps_less = self.checkpointing == "selective" or (self.checkpointing == "none" and x.dim() == 2)
        # compiled, the partitioner does it: it keeps products and makes what is pointwise again
        if not keeps_less or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._compute(x, turns, packed, rows=rows)
        with Remade() as remade:
            return self._compute(x, turns, packed, None, remade, rows=rows)

    def _compute(
        self,
        x: Tensor,
        turns: Tensor,
        packed: Segments | None,
        cache: Cache | None = None,
        remade: Remade | None = None,
        index: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        divided = x.dim() == 2
        h = self._entering(self.attention_norm, x, turns, remade)
        more = (rows, self.checkpointing == "none") if isinstance(self.attention, Attention) else ()
        x = only(x, rows) + self.attention(h, turns, packed, cache, index, divided, *more)
        h = self._entering(self.ffn_norm, x, turns, remade)
        return x + self.feed_forward(h, divided, remade if self.checkpointing == "selective" else None)

    def _entering(self, norm: RMSNorm, x: Tensor, turns: Tensor, remade: Remade | None) -> Tensor:
        """norm(x) of all tokens on every rank, the column layers' input: (B, T, D)."""
        share = copy_to_mp if x.dim() == 3 else partial(gather_tokens, shape=turns.shape[:2])
        h = norm(x)
        whole = share(h)
        if remade is not None:
            x, mine = x.detach(), None if self.checkpointing == "selective" else h.detach()
            remade.note(whole, lambda: share(norm(x) if mine is None else mine))
        return whole


class Transformer(nn.Module):
    """The model. Every rank of an mp group builds it and calls it with the same tokens; results are replicated across mp.

    `model(tokens)` -> logits (B, T, V).  `model(tokens, labels=..)` -> (summed loss, number of supervised tokens, metrics).
    `model.hidden(tokens)` -> (B, T, D).  Modules may be replaced, hooked and moved; `output`, the head, is None where it is the
    embedding's weight, and one of one's own, (.., D) -> (.., any), counts in logits and loss."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        groups.ensure()
        if args.vocab_size < 1:
            raise ValueError("params: vocab_size is not known; set it, or load a checkpoint or a tokenizer that tells")
        check_model_parallel(args, groups.mp_size())
        self.args, self.sequence_parallel = args, False
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None  # the embedding's own weight
        if not args.tie_word_embeddings:
            self.output = ColumnParallelLinear(args.dim, self.tok_embeddings.num_embeddings)
        with torch.device("cpu"):  # not a weight: whoever builds within torch.device("meta") would never get it back
            self.freqs, self.rope_factor = rope.frequencies(args.head_size, args.rope_theta, args.rope_scaling)

    @classmethod
    def from_pretrained(cls, path, **options) -> "Transformer":
        """A model with the weights in `path`, in any format that is read; see model/pretrained.py for the options."""
        from accessory.model.pretrained import load

        return load(path, **options)

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        # (B, T): aligned with tokens, -100 = no loss; shifted by one inside. On the host, or a GPU is waited for
        labels: Tensor | Targets | None = None,
        positions: Tensor | None = None,  # (B, T): for the rotary embedding; default 0, 1, ... in each sequence
        cu_seqlens: Tensor | Segments | None = None,  # (S+1,): bounds of the sequences packed in one row; B must be 1
        cache: Cache | None = None,
    ) -> Any:
        check_tokens(tokens, self)
        packed = segments(tokens, cu_seqlens)
        targets = None if labels is None else targets_of(labels, tokens, packed, self.args.vocab_size)
        x = self._stream(tokens, positions, packed, cache, targets)
        return over_mp(self._logits(self._whole(x, tokens))) if targets is None else self._loss(x, tokens, targets)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | Segments | None = None
    ) -> Tensor:
        """What the head is given, (B, T, D) after the last norm, for a head or a loss of one's own. Arguments and errors are
        `forward`'s. Under mp it is the same on every rank, and each computes the whole loss from it, by modules that are not split:
        `output` is, so logits are `forward`'s to give. Under FSDP it gathers the weights as `forward` does."""
        check_tokens(tokens, self)
        return over_mp(self._whole(self._stream(tokens, positions, segments(tokens, cu_seqlens)), tokens))

    def _stream(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        packed: Segments | None,
        cache: Cache | None = None,
        targets: Targets | None = None,
    ) -> Tensor:
        """(B, T, D) after the last norm, or under sequence parallel (N/mp, D)."""
        if positions is None:
            positions = (
                packed.positions if packed else torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            )
        check_positions(positions, tokens)
        if self.args.sliding_window:
            longest = packed.longest if packed else tokens.shape[1] if cache is None else int(positions.max()) + 1
            check_window(longest, self.args.sliding_window)
        freqs = self.freqs.to(tokens.device)
        if not tokens.is_meta:
            self.freqs = freqs  # once: a copy from the host would wait for the GPU in every step
        turns = rope.table(positions, freqs, self.rope_factor)
        divided = self.sequence_parallel and groups.mp_size() > 1 and cache is None
        x = self.tok_embeddings.divided(tokens) if divided else self.tok_embeddings(tokens)
        rows = targets.few(x.dtype) if targets and x.dim() == 3 and cache is None and self._narrows() else None
        for index, layer in enumerate(self.layers):
            last = rows is not None and index == len(self.layers) - 1
            x = layer(x, turns, packed, cache, index, rows) if last else layer(x, turns, packed, cache, index)
        return self.norm(x)

    def _whole(self, x: Tensor, tokens: Tensor) -> Tensor:
        """What `_stream` gives as (B, T, D), replicated; its gradient is then the whole on every rank, no addend."""
        if x.dim() == 3:
            return x
        return gather_from_mp(x.t()).t()[: tokens.numel()].view(*tokens.shape, -1)

    def _logits(self, x: Tensor) -> Tensor:
        """(.., D), replicated -> (.., V). The head is called as the module it is, for hooks; one of one's own gets all of x."""
        if self.output is not None and not isinstance(self.output, ColumnParallelLinear):
            return self.output(x)
        x = copy_to_mp(x)
        y = linear(x, self.head) if self.output is None else self.output(x)
        return gather_from_mp(y)[..., : self.args.vocab_size]

    @property
    def head(self) -> Tensor:
        """The head's weight, this rank's (padded V)/mp rows: the embedding's own when they are tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def _loss(self, x: Tensor, tokens: Tensor, targets: Targets) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        # (M, D): only what has a target goes through the head
        if self._fuses():
            if x.dim() == 2:
                x = gather_rows(x, targets.host_rows)
            elif x.shape[:2] != tokens.shape:
                x = copy_to_mp(x[0, : len(targets.ids)])
            else:
                x = copy_to_mp(x.flatten(0, 1)[targets.rows])
            loss, correct = linear_cross_entropy(x, self.head, targets.ids, self.args.vocab_size)
        else:
            logits = self._logits(self._whole(x, tokens).flatten(0, 1)[targets.rows]).float()
            loss = over_mp(F.cross_entropy(logits, targets.ids, reduction="sum"))
            correct = (logits.argmax(-1) == targets.ids).sum()
        return loss, torch.full((), len(targets.ids), device=loss.device), {"correct": correct}

    def _narrows(self) -> bool:
        """Whether the last layer may leave out rows that have no target: not where it is not ours, or something looks
        at what it or its parts give."""
        if not (self._fuses() and len(self.layers)):
            return False
        layer = self.layers[-1]
        if not (
            _forwards(layer, Block)
            and _forwards(layer.attention, Attention)
            and _forwards(layer.feed_forward, FeedForward)
        ):
            return False
        if any(isinstance(m, LoRA) and m.training and m.lora_dropout for m in layer.modules()):
            return False  # masks would be drawn for fewer rows than under sequence parallel
        hooks = (hook for m in (*layer.modules(), self.norm) for hook in _hooks(m))
        return all(getattr(hook, "__module__", "").startswith("torch.distributed.fsdp") for hook in hooks)

    def _fuses(self) -> bool:
        """Whether head and loss may be one step: not where the head is more than its weight, nor under torch.func."""
        if transformed():
            return False
        head = self.output
        plain = isinstance(head, ColumnParallelLinear) and head.bias is None
        return head is None or plain and not head._forward_hooks and not head._forward_pre_hooks

    @torch.no_grad()
    def init_weights(
        self, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Transformer":
        """Random weights for training from nothing: normal of std 0.02 (0.02 / sqrt(2 n_layers) for wo, w2), norms 1, biases 0.

        Drawn from (seed, name) for the whole matrix and then cut: the same model at every model-parallel size."""
        for name in [n for n, _ in self.named_parameters()]:
            set_parameter(self, name, self.drawn(name, seed).to(device=device, dtype=dtype))
        return self

    def drawn(self, name: str, seed: int) -> Tensor:
        """This rank's part of one parameter's random start."""
        return local_slice(self, name, partial(self._draw, name, seed))

    def _draw(self, name: str, seed: int, shape: tuple[int, ...]) -> Tensor:
        if "norm." in name:
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        std = 0.02 / (2 * self.args.n_layers) ** 0.5 if shard_dim(name) == 1 else 0.02
        return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(named_seed(seed, name)))


def _forwards(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its forward is that of `kind`, which FSDP leaves and somebody's own does not."""
    return getattr(module.forward, "__func__", None) is kind.forward


def _hooks(module: nn.Module) -> list[Callable]:
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return [hook for kind in kinds for hook in kind.values()]


def global_shape(args: ModelArgs, name: str, lora_rank: int = 0) -> tuple[int, ...]:
    """The unsharded shape of a parameter, true vocabulary rows, each kv head once. Raises ValueError for a name no LLaMA has."""
    q, kv = args.n_heads * args.head_size, args.kv_heads * args.head_size
    shapes = {
        **{"wq": (q, args.dim), "wk": (kv, args.dim), "wv": (kv, args.dim), "wo": (args.dim, q)},
        **{"w1": (args.ffn_dim, args.dim), "w3": (args.ffn_dim, args.dim), "w2": (args.dim, args.ffn_dim)},
        **{"tok_embeddings": (args.vocab_size, args.dim), "output": (args.vocab_size, args.dim)},
        **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), (args.dim,)),
        **dict.fromkeys(("q_norm", "k_norm"), (args.head_size,)),
    }
    parts = name.split(".")
    adapter = parts[-2] if len(parts) > 2 and parts[-2] in ("lora_a", "lora_b") else None
    module = parts[-3] if adapter else parts[-2] if len(parts) > 1 else name
    if module not in shapes or parts[-1] not in ("weight", "bias"):
        raise ValueError(f"{name}: not a parameter of a LLaMA")
    out, *rest = shapes[module]
    if adapter:
        return (lora_rank, *rest) if adapter == "lora_a" else (out, lora_rank)
    return (out,) if parts[-1] == "bias" else (out, *rest)


def local_range(args: ModelArgs, name: str) -> tuple[int | None, int, int]:
    """(dim, start, stop): the part of the unsharded parameter that this mp rank holds; (None, 0, 0) for all of it."""
    dim = shard_dim(name)
    if dim is None:
        return None, 0, 0
    size, rank = groups.mp_size(), groups.mp_rank()
    module = next(m for m in reversed(name.split(".")) if m in SHARD_DIM)
    if module in ("tok_embeddings", "output"):
        return dim, *vocab_range(args.vocab_size)
    if module in ("wk", "wv") and size > args.kv_heads:  # copies of whole heads on neighbouring ranks
        head = rank // (size // args.kv_heads)
        return dim, head * args.head_size, (head + 1) * args.head_size
    whole = global_shape(args, name, lora_rank=1)[dim]
    return dim, rank * whole // size, (rank + 1) * whole // size


def local_slice(model: Transformer, name: str, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """This rank's part, padded to its parameter's shape, of what `draw(unsharded shape)` gives."""
    parameter = model.get_parameter(name)
    rank = parameter.shape[0] if ".lora_a." in name else parameter.shape[-1] if ".lora_b." in name else 0
    dim, start, stop = local_range(model.args, name)
    whole = draw(global_shape(model.args, name, lora_rank=rank))
    return pad_rows(whole if dim is None else whole.narrow(dim, start, stop - start).clone(), parameter.shape)


def pad_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Zero rows below, up to `shape`: the last ranks' share of a vocabulary that mp does not divide."""
    missing = shape[0] - tensor.shape[0]
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a (meta) parameter by `value`, of the same shape, frozen or not as it was."""
    owner, _, key = name.rpartition(".")
    old = model.get_parameter(name)
    assert old.shape == value.shape, f"{name}: {tuple(value.shape)} for a parameter of {tuple(old.shape)}"
    setattr(
        model.get_submodule(owner),
        key,
        nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point()),
    )


def kv_copied(name: str) -> bool:
    """Whether this parameter is held in copies by neighbouring ranks when mp > n_kv_heads (rows of wk, wv)."""
    parts = name.split(".")
    return ("wk" in parts or "wv" in parts) and shard_dim(name) == 0


assert set(LINEARS) <= set(SHARD_DIM) and all(SHARD_DIM[n] == 0 for n in COLUMN)
