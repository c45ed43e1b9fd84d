"""LoRA merged into its base: W + (alpha / rank) B A, in fp32, returned in the base's dtype, one slice at a time.

    base    layers.0.attention.wq.weight            (out, in)  bf16
    adapter layers.0.attention.wq.lora_a.weight A   (r, in)    fp32     B rows and A columns are sliced along with W
            layers.0.attention.wq.lora_b.weight B   (out, r)   fp32
            output.weight, ...bias, ...norm.weight          replace the base's (modules_to_save, bias and norm tuning)

Reading fills `changes`, the largest change of each weight after rounding to the base's dtype: a merge that changes
nothing is a mistake and `require_change` says so. Test: tests/unit/test_merge.py
"""

from typing import Any

import torch
from torch import Tensor

from accessory.weights import Renamed, Source, base_weight, is_lora


class MergedLoRA:
    """Base and adapter as one plain model. Raises ValueError when an adapter tensor has no base or another shape."""

    def __init__(self, base: Source, adapter: Source, config: dict[str, Any]) -> None:
        self.base, self.adapter = base, adapter
        self.scale = config["lora_alpha"] / config["lora_rank"] if config["lora_rank"] else 0.0
        self.changes: dict[str, float] = {}
        self._lora = {base_weight(n) for n in adapter.names() if is_lora(n)}
        self._replaced = [n for n in adapter.names() if not is_lora(n)]
        self._base = set(base.names())
        self._check()

    def _check(self) -> None:
        for name in sorted(self._lora):
            a, b = lora_names(name)
            if missing := {a, b} - set(self.adapter.names()):
                raise ValueError(f"the adapter has no {missing.pop()}: one half of a LoRA is missing")
            if name not in self._base:
                raise ValueError(f"the adapter changes {name}, which its base does not have: another base was meant")
            out, columns = self.base.shape(name)
            if (self.adapter.shape(b)[0], self.adapter.shape(a)[1]) != (out, columns):
                shapes = f"B {self.adapter.shape(b)} and A {self.adapter.shape(a)}"
                raise ValueError(f"{name} is {out}x{columns}, but the adapter's {shapes} are of another model")
        for name in self._replaced:
            if name in self._base and self.adapter.shape(name) != self.base.shape(name):
                raise ValueError(
                    f"{name} is {self.base.shape(name)} in the base and {self.adapter.shape(name)} in the adapter"
                )

    def names(self) -> list[str]:
        return self.base.names() + [n for n in self._replaced if n not in self._base]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name) if name in self._base else self.adapter.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The base's; a tensor that only the adapter has (a bias, an untied output) takes the embedding's."""
        return self.base.dtype(name if name in self._base else "tok_embeddings.weight")

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        old = self.base.read(name, dim, start, stop) if name in self._base else None
        if name in self._replaced:
            new = self.adapter.read(name, dim, start, stop)
        elif name in self._lora:
            assert old is not None
            a, b = lora_names(name)
            rows, columns = ((dim, start, stop) if dim == d else (None, 0, None) for d in (0, 1))
            new = torch.addmm(
                old.float(),
                self.adapter.read(b, *rows).float(),
                self.adapter.read(a, *columns).float(),
                alpha=self.scale,
            )
        else:
            assert old is not None
            return old
        new = new.to(self.dtype(name))
        self._note(name, new, old)
        return new

    def _note(self, name: str, new: Tensor, old: Tensor | None) -> None:
        change = new.float() if old is None else new.float() - old.float()
        largest = change.abs().max().item() if change.numel() else 0.0
        if not largest < float("inf"):
            raise ValueError(
                f"{name} is not finite after merging: the adapter is damaged, or too large for {self.dtype(name)}"
            )
        self.changes[name] = max(self.changes.get(name, 0.0), largest)

    def require_change(self) -> tuple[str, float]:
        """(name, size) of the largest change, once everything has been read. Raises ValueError when nothing changed."""
        if not any(self.changes.values()):
            raise ValueError(
                f"merging changed none of the {len(self._lora) + len(self._replaced)} weights of the adapter: "
                "it is untrained, or its changes vanish in the base's dtype"
            )
        return max(self.changes.items(), key=lambda item: item[1])


def merged(base: Source, adapter: Source, config: dict[str, Any]) -> MergedLoRA:
    """`config`: lora_rank and lora_alpha, as in adapter.json or `Checkpoint.adapter`."""
    return MergedLoRA(base, adapter, config)


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
