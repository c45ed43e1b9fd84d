"""LoRA adapters of Hugging Face's PEFT <-> ours: names, and the row order of q and k. The terms are in weights/peft_config.py.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight (r, in)    layers.3.attention.wq.lora_a.weight  as it is
                                             .q_proj.lora_B.weight (out, r)   layers.3.attention.wq.lora_b.weight  rows as q_proj's
    base_model.model.lm_head.weight, ...q_proj.base_layer.bias                output.weight, ...wq.bias    (trained in full)
    base_model.model.model.embed_tokens.lora_embedding_A (r, V), _B (D, r)    tok_embeddings.lora_b = A^T, .lora_a = B^T

PEFT gives a tied head its own weight as soon as the embedding is trained: `over` does the same. Test:
tests/unit/test_peft.py (against peft itself).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.lora import LINEARS, linear_of
from accessory.weights import Overlay, Renamed, Source, hf, is_lora, owned_slice
from accessory.weights.lora import Adapted
from accessory.weights.peft_config import (
    ENDS,
    check_config,
    full_terms,
    hf_module,
    is_targeted,
    linears_of_layer,
    terms_from_config,
)

PREFIX = "base_model.model."
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[\w.]+?)\."
    r"(?:(?P<lora>lora_[AB])(?:\.\w+)?\.weight|(?P<embedding>lora_embedding_[AB])(?:\.\w+)?"
    r"|(?:base_layer\.|modules_to_save\.(?:\w+\.)?)?(?P<kind>weight|bias))"
)
HALVES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_embedding_A": "lora_b", "lora_embedding_B": "lora_a"}


class _Turned(Renamed):
    """A source under other names, where `turn[name]` changes the order of a small tensor's rows or transposes it."""

    def __init__(self, source: Source, names: dict[str, str], turn: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(source, names)
        self.turn = turn

    def shape(self, name: str) -> tuple[int, ...]:
        shape = super().shape(name)
        return shape[::-1] if self.turn.get(name) is Tensor.t else shape

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self.turn:
            return super().read(name, dim, start, stop)
        return owned_slice(self.turn[name](super().read(name)), dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return (self.read if name in self.turn else super().view)(name, dim, start, stop)

    def read_into(self, out: Tensor, name: str, dim: int | None, start: int, stop: int | None) -> None:
        out.copy_(self.view(name, dim, start, stop))


class FromPEFT:
    """The tensors of a PEFT adapter under Meta's names, and its `terms`. `args`: its base's sizes; without them all but the
    rows of q and k can be read. Raises ValueError naming `where` (its directory) and the tensor for what is no part of a LLaMA,
    and for an adapter that is not whole."""

    def __init__(
        self, source: Source, config: dict[str, Any], args: ModelArgs | None, where: object = "the adapter"
    ) -> None:
        check_config(config, f"{where}/adapter_config.json")
        self.raw, self.config, self.where = source, config, where
        lora, full, turned = self._keys()
        self.keys = lora | {hf.meta_name(n): key for n, key in full.items()}  # our name -> PEFT's
        self.layers = (
            args.n_layers if args else max((int(n.split(".")[1]) + 1 for n in lora if n[:7] == "layers."), default=0)
        )
        self._check_whole(lora, full)
        reorder = self._without_base if args is None else lambda t: hf.halves_to_pairs(t, args.head_size)
        turn = {n: Tensor.t for n in turned} | {n: reorder for n in lora if re.search(r"\.w[qk]\.lora_b\.weight$", n)}
        whole = Renamed(source, full)
        rows = hf.FromHF(whole, args.head_size) if args else _Turned(whole, {hf.meta_name(n): n for n in full}, {})
        self.source = Overlay(rows, _Turned(source, lora, turn))
        ranks = {linear_of(n): self.source.shape(n)[0] for n in lora if ".lora_a." in n}
        self.terms = terms_from_config(config, ranks, rows.names(), self.layers, f"{where}/adapter_config.json")

    def _keys(self) -> tuple[dict[str, str], dict[str, str], set[str]]:
        """({Meta's name: key} of LoRA halves, {HF's name: key} of whole tensors, the halves to transpose)."""
        lora: dict[str, str] = {}
        full: dict[str, str] = {}
        turned = set()
        for key in self.raw.names():
            match = KEY.fullmatch(key)
            name = match and hf.meta_name(f"{match['module']}.{match['kind'] or 'weight'}")
            if match and match["module"].endswith("original_module"):
                continue
            half = match and (match["lora"] or match["embedding"])
            linear = linear_of(name or "")
            is_embedding = bool(match and match["embedding"])
            if (
                not name
                or (half and linear.rsplit(".", 1)[-1] not in (*LINEARS, *ENDS))
                or (half and is_embedding != (linear == "tok_embeddings"))
            ):
                raise ValueError(f"{self.where}: {key} has no counterpart in a LLaMA, or is no part of a LoRA")
            target, name = (lora, f"{linear}.{HALVES[half]}.weight") if half else (full, hf.hf_name(name))
            if name in target:
                raise ValueError(f"{self.where}: {key} and {target[name]} are the same weight: remove one")
            target[name] = key
            turned |= {name} if is_embedding else set()
        return lora, full, turned

    def _check_whole(self, lora: dict[str, str], full: dict[str, str]) -> None:
        if not lora:
            raise ValueError(f"{self.where}: holds no LoRA weights: the adapter was saved empty, save it again")
        linears = {linear_of(n) for n in lora}
        for name in (f"{n}.{h}.weight" for n in sorted(linears) for h in ("lora_a", "lora_b")):
            if name not in lora:
                raise ValueError(f"{self.where}: has no {name}: one half of a LoRA is missing")
        every = [n for i in range(self.layers) for n in linears_of_layer(i)] + list(ENDS)
        if missing := [hf_module(n) for n in every if n not in linears and is_targeted(self.config, hf_module(n))]:
            raise ValueError(
                f"{self.where}: has no LoRA for {missing[0]} ({len(missing)} such), which target_modules names: "
                "the adapter was saved in part, save it again"
            )
        for saved in self.config.get("modules_to_save") or ():
            if not any(linear_of(n).endswith(saved) or f".{saved}." in f".{n}" for n in full):
                raise ValueError(f"{self.where}: has no weight of {saved}, which modules_to_save names: save it again")

    def _without_base(self, tensor: Tensor) -> Tensor:
        raise ValueError(f"{self.where}: the size of a head is not known without its base: say where it is with --base")

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(name, dim, start, stop)

    def over(self, base: Source, args: ModelArgs) -> "FromPEFT":
        """The same adapter for this base: rows in Meta's order, and where the base's head is tied and the adapter trains the
        embedding or the head, an output.weight of its own, as in PEFT (unless ensure_weight_tying keeps them one)."""
        fitted = FromPEFT(self.raw, self.config, args, self.where)
        names, (embedding, head) = set(fitted.names()), (f"{n}.weight" for n in ENDS)
        lora = {linear_of(n) for n in names if is_lora(n)}
        if head in base.names():
            return fitted
        if self.config.get("ensure_weight_tying") and {embedding, head} <= names and not lora & set(ENDS):
            fitted.source = Renamed(fitted.source, {n: n for n in fitted.names() if n != head})
        elif head not in names and (embedding in names or lora & set(ENDS)):
            has_base = embedding in names and "tok_embeddings" in lora  # peft saved its base_layer along
            saved = fitted.source if has_base else base
            fitted.source = Overlay(fitted.source, Renamed(saved, {head: embedding}))
        full = [n for n in fitted.names() if not is_lora(n)]
        fitted.terms |= full_terms(full, fitted.layers)
        return fitted


def without_lora_on_ends(
    adapter: Source, terms: dict[str, Any], base: Source, where: object
) -> tuple[Source, dict[str, Any]]:
    """(adapter, terms) with the LoRA on embedding and head, which our models have none of, as whole weights in fp32."""
    ends = [n for n in ENDS if f"{n}.lora_a.weight" in adapter.names()]
    if not ends:
        return adapter, terms
    rest = [n for n in adapter.names() if linear_of(n) not in ends]
    mine = Renamed(adapter, {n: n for n in adapter.names() if linear_of(n) in ends})
    whole = Renamed(Adapted(base, mine, terms, where), {f"{n}.weight": f"{n}.weight" for n in ends})
    targets = [t for t in terms["lora_targets"] if t not in ends]
    patterns = {k: {n: v for n, v in terms[k].items() if n not in ends} for k in ("rank_pattern", "alpha_pattern")}
    saved = sorted({*terms["modules_to_save"], *ends})
    rank = terms["lora_rank"] if targets else 0
    changed = {"lora_rank": rank, "lora_targets": targets, "modules_to_save": saved}
    return Overlay(Renamed(adapter, {n: n for n in rest}), whole), terms | patterns | changed


class ToPEFT(Overlay):
    """The tensors of an adapter of ours under PEFT's names. `args`: the base's. A tied base's trained embedding is given as
    embedding and as head, or PEFT would leave the head as it was; unless the adapter has a head of its own."""

    def __init__(self, source: Source, args: ModelArgs) -> None:
        lora = [n for n in source.names() if is_lora(n)]
        linears = {linear_of(n) for n in lora}
        names = {_half(n): n for n in lora}
        turn = {
            _half(n): lambda t: hf.pairs_to_halves(t, args.head_size)
            for n in lora
            if re.search(r"\.w[qk]\.lora_b\.", n)
        }
        untied = replace(args, tie_word_embeddings=False)  # or ToHF would leave the head out
        whole = hf.ToHF(Renamed(source, {n: n for n in source.names() if not is_lora(n)}), untied)
        full = {_full(n, linears): n for n in whole.names()}
        if args.tie_word_embeddings and "model.embed_tokens.weight" in whole.names():
            full.setdefault(f"{PREFIX}lm_head.weight", "model.embed_tokens.weight")
        super().__init__(_Turned(source, names, turn), Renamed(whole, full))
        self.ours = names | {key: hf.meta_name(n) for key, n in full.items()}  # PEFT's name -> ours


def _half(name: str) -> str:
    """layers.3.attention.wq.lora_a.weight -> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"""
    return f"{PREFIX}{hf_module(linear_of(name))}.{'lora_A' if '.lora_a.' in name else 'lora_B'}.weight"


def _full(name: str, linears: set[str]) -> str:
    """A whole tensor's key; the bias of a linear that has a LoRA lies one deeper."""
    module, kind = name.rsplit(".", 1)
    wrapped = kind == "bias" and linear_of(hf.meta_name(name) or "") in linears
    return f"{PREFIX}{module}.{'base_layer.' if wrapped else ''}{kind}"
