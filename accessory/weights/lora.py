"""LoRA merged into its base: W + s B A, adapter after adapter in fp32, rounded once to the base's dtype, slice by slice.

    base       layers.0.attention.wq.weight            (out, in)  bf16
    adapter    layers.0.attention.wq.lora_a.weight A   (r, in)    fp32     B rows and A columns are sliced along with W
               layers.0.attention.wq.lora_b.weight B   (out, r)   fp32
               output.weight, ...bias, ...norm.weight          replace the base's (modules_to_save, bias and norm tuning)

    running = Adapted(base, first, terms, "first")             each is a Source over the one before, in fp32 where it changes
    running = Adapted(running, second, terms, "second")
    model = MergedLoRA(running)                                the rounded result

Reading `MergedLoRA` fills `changes`, the largest change of each weight after rounding, and notes which adapter changed
anything: one that changes nothing is a mistake and `require_change` says so. Test: tests/unit/test_merge.py
"""

import re
from typing import Any

import torch
from torch import Tensor

from accessory.model.lora import TuningArgs
from accessory.weights import Renamed, Source, base_weight, is_lora

VOCABULARY = ("tok_embeddings.weight", "output.weight")  # whose rows an adapter may add to


class Adapted:
    """`base` with one adapter over it; what it touches is fp32, not rounded. `terms`: adapter.json's; `label` names it.

    Raises ValueError when an adapter tensor has no base or another shape; only the vocabulary may have grown."""

    def __init__(self, base: Source, adapter: Source, terms: dict[str, Any], label: object = "the adapter") -> None:
        self.base, self.adapter, self.label = base, adapter, str(label)
        self.tuning = TuningArgs.from_terms(terms)
        self.lora = {base_weight(n) for n in adapter.names() if is_lora(n)}
        self.replaced = {n for n in adapter.names() if not is_lora(n)}
        self._base = set(base.names())
        for name in sorted(self.replaced):
            if name in self._base:
                self._check_replaced(name)
            elif not name.endswith(".bias") and name != "output.weight":
                raise ValueError(f"{self.label} changes {name}, which its base does not have: another base was meant")
        for name in sorted(self.lora):
            self._check_lora(name)

    def _check_lora(self, name: str) -> None:
        a, b = lora_names(name)
        if missing := {a, b} - set(self.adapter.names()):
            raise ValueError(f"{self.label} has no {missing.pop()}: one half of a LoRA is missing")
        if name not in self._base | self.replaced:
            raise ValueError(f"{self.label} changes {name}, which its base does not have: another base was meant")
        out, columns = self.shape(name)
        shapes = self.adapter.shape(b), self.adapter.shape(a)
        if (shapes[0][0], shapes[1][1]) != (out, columns):
            raise ValueError(
                f"{name} is {out}x{columns}, but the B {shapes[0]} and A {shapes[1]} of {self.label} are of another model"
            )
        if (rank := self.tuning.rank_of(name)) != shapes[1][0] or rank != shapes[0][1]:
            raise ValueError(f"{self.label}: {a} has rank {shapes[1][0]}, but its terms say {rank}")

    def _check_replaced(self, name: str) -> None:
        old, new = self.base.shape(name), self.adapter.shape(name)
        if name in VOCABULARY and old[1:] == new[1:] and len(new) == 2:
            if new[0] < old[0]:
                raise ValueError(f"{name} of {self.label} has {new[0]} rows after {old[0]}: a vocabulary only grows")
        elif old != new:
            raise ValueError(f"{name} is {old} in the base and {new} in {self.label}")

    def touches(self, name: str) -> bool:
        return name in self.lora or name in self.replaced

    def names(self) -> list[str]:
        return self.base.names() + [n for n in self.adapter.names() if n in self.replaced - self._base]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.adapter.shape(name) if name in self.replaced else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.touches(name) else self.base.dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        if not self.touches(name):
            return self.base.read(name, dim, start, stop)
        old = None if name in self.replaced else self.base.read(name, dim, start, stop)
        return self.apply(name, old, dim, start, stop)

    def apply(self, name: str, old: Tensor | None, dim: int | None, start: int, stop: int | None) -> Tensor:
        """The slice after this adapter, in fp32, from the slice before it (None, where it replaces the weight)."""
        new = (self.adapter.read(name, dim, start, stop) if name in self.replaced else old).float()
        if name not in self.lora:
            return new
        a, b = lora_names(name)
        rows, columns = ((dim, start, stop) if dim == d else (None, 0, None) for d in (0, 1))
        low_rank = self.adapter.read(b, *rows).float(), self.adapter.read(a, *columns).float()
        return torch.addmm(new, *low_rank, alpha=self.tuning.scale_of(name))


class MergedLoRA:
    """A chain of `Adapted` as one plain model in the dtypes of its base, or in `dtype`."""

    def __init__(self, last: Adapted, dtype: torch.dtype | None = None) -> None:
        self.stages, below = [last], last.base
        while isinstance(below, Adapted):
            self.stages.insert(0, below)
            below = below.base
        self.base, self.last, self.stored = below, last, dtype
        self.changes: dict[str, float] = {}
        self.changed_by: dict[str, set[str]] = {stage.label: set() for stage in self.stages}
        self._base = set(below.names())
        rows = {n: last.shape(n)[0] for n in VOCABULARY if n in last.names()}
        if len(set(rows.values())) > 1:
            sizes = " and ".join(f"{n} {count}" for n, count in rows.items())
            raise ValueError(
                f"the vocabulary of {last.label} has grown in one of two places, rows of {sizes}: save both with the adapter"
            )

    def names(self) -> list[str]:
        return self.last.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.last.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The base's; a tensor that only an adapter has (a bias, an untied output) takes the embedding's."""
        return self.stored or self.base.dtype(name if name in self._base else "tok_embeddings.weight")

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        stages = [s for s in self.stages if s.touches(name)]
        replacing = [i for i, s in enumerate(stages) if name in s.replaced]
        stages = stages[replacing[-1] if replacing else 0 :]  # what came before the last replacement is gone
        value = before = self._of_base(name, dim, start, stop)
        for stage in stages:
            value = stage.apply(name, value, dim, start, stop)
            self._note(name, value.to(self.dtype(name)), before, stage.label)
            before = value.to(self.dtype(name))
        assert before is not None
        if stages:
            self._note(name, before, self._of_base(name, dim, start, stop))
        return before.to(self.dtype(name))

    def _of_base(self, name: str, dim: int | None, start: int, stop: int | None) -> Tensor | None:
        """The base's slice, of a vocabulary that has grown the rows that it has."""
        if name not in self._base:
            return None
        if dim == 0:
            rows = self.base.shape(name)[0]
            start, stop = min(start, rows), rows if stop is None else min(stop, rows)
        return self.base.read(name, dim, start, stop)

    def _note(self, name: str, new: Tensor, old: Tensor | None, label: str | None = None) -> None:
        """Notes how much this slice changed: for one adapter that it did, for all together by how much."""
        known = 0 if old is None else len(old)
        added = new[known:].float().abs()
        change = (new[:known].float() - old.float()).abs() if old is not None else added
        largest = max((t.max().item() for t in (change, added) if t.numel()), default=0.0)
        if not largest < float("inf"):
            raise ValueError(
                f"{name} is not finite after merging: {label or 'the adapter'} is damaged, or too large for {self.dtype(name)}"
            )
        if label is None:
            self.changes[name] = max(self.changes.get(name, 0.0), largest)
        elif largest > 0 or len(added):
            self.changed_by[label].add(name)

    def require_change(self) -> tuple[str, float]:
        """(name, size) of the largest change, once everything has been read. Raises ValueError naming an adapter that
        changed nothing."""
        for stage in self.stages:
            if not self.changed_by[stage.label]:
                raise ValueError(
                    f"{stage.label}: merging changed none of its {len(stage.lora | stage.replaced)} weights: it is untrained, "
                    "its changes vanish in the base's dtype, or a later adapter replaces what it has"
                )
        return max(self.changes.items(), key=lambda item: item[1])

    def change_lines(self) -> list[str]:
        """One line per kind of weight: how many of them changed, and by how much at most, in which layer."""
        kinds: dict[str, dict[str, float]] = {}
        for name, size in self.changes.items():
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), {})[name] = size
        width = max(map(len, kinds), default=0)
        lines = []
        for kind, sizes in kinds.items():
            largest = max(sizes, key=sizes.__getitem__)
            layer = f" in {largest.removesuffix('.weight')}" if largest != kind else ""
            count = f"{sum(s > 0 for s in sizes.values())} of {len(sizes)}"
            lines.append(f"{kind:<{width}}   {count} changed, by up to {sizes[largest]:.3g}{layer}")
        return lines


def merged(base: Source, adapter: Source, terms: dict[str, Any]) -> MergedLoRA:
    """One adapter over its base. `terms`: as in adapter.json or `Checkpoint.adapter`."""
    return MergedLoRA(Adapted(base, adapter, terms))


def separated(source: Source) -> tuple[Source, Source]:
    """A source that holds base and LoRA together (Accessory's checkpoints) as (base, adapter)."""
    names = source.names()
    return Renamed(source, {n: n for n in names if not is_lora(n)}), Renamed(
        source, {n: n for n in names if is_lora(n)}
    )


def lora_names(weight: str) -> tuple[str, str]:
    """layers.0.attention.wq.weight -> (...wq.lora_a.weight, ...wq.lora_b.weight)"""
    stem = weight.removesuffix(".weight")
    return f"{stem}.lora_a.weight", f"{stem}.lora_b.weight"
