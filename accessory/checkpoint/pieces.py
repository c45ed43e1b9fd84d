"""The training state as pieces: each rank writes what it holds, and where that lies in the whole, true tensor.

    resume/state-00002-of-00008.safetensors    layers.0.attention.wq.weight              a piece of the parameter, fp32
                                               layers.0.attention.wq.weight/exp_avg      and of its moments, fp32 or bf16
                                               layers.0.attention.wq.weight/exp_avg_sq
      __metadata__["pieces"], JSON             {name: {"at": [[24, 36], [0, 48]], "of": [48, 48]}}

    the whole  --mp-->  a slice (rows or columns)  --dp-->  some of its rows          a piece is a box in the whole

Whole is without padding rows of the vocabulary and with each kv head once, and every number is written by one rank. So a
run on any mp, dp and --data_parallel reads what another has written: it copies what its boxes and the saved ones share.
Test: tests/dist/test_any_layout.py
"""

import json
import re
from collections.abc import Collection, Mapping
from itertools import combinations
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from accessory.checkpoint.formats_read import DAMAGED, MAPPED_LIMIT, safetensors_header
from accessory.checkpoint.formats_stream import write_safetensors
from accessory.model.args import ModelArgs
from accessory.model.llama import global_shape, kv_copied, local_range
from accessory.model.lora import packed_weights
from accessory.parallel import groups
from accessory.parallel.fsdp import local, rows_of_rank

MOMENTS = ("exp_avg", "exp_avg_sq")
MIXED = "a file is missing, or the directory mixes files of two checkpoints"
STATE_FILE = re.compile(r"state-(\d{5})-of-(\d{5})\.safetensors")

Box = tuple[tuple[int, int], ...]  # [start, stop) on every dimension


class Piece(NamedTuple):
    """What this rank holds of one parameter: the first rows of its local tensor are `box` of the whole.

    The rows of the local tensor beyond the box are padding."""

    box: Box
    slice: Box  # what the mp rank holds, before dp cuts it
    shape: tuple[int, ...]  # of the whole
    written: bool  # by this rank into its mp rank's file: false for what has no rows, or is another dp rank's to write
    owned: bool  # and into resume/: false for what another mp rank holds too, and writes

    @property
    def rows(self) -> int:
        return self.box[0][1] - self.box[0][0]


def pieces(model: nn.Module) -> dict[str, Piece]:
    """This rank's piece of every parameter, trained or frozen, of a model that is sharded; not of weights held in NF4, which
    are in no checkpoint."""
    packed, named = packed_weights(model), enumerate(model.named_parameters())
    return {name: _piece(model.args, name, p, index) for index, (name, p) in named if name not in packed}


def _piece(args: ModelArgs, name: str, parameter: nn.Parameter, index: int) -> Piece:
    rank = parameter.shape[0] if ".lora_a." in name else parameter.shape[-1] if ".lora_b." in name else 0
    shape = global_shape(args, name, rank)
    dim, start, stop = local_range(args, name)
    cut = tuple((start, stop) if d == dim else (0, size) for d, size in enumerate(shape))
    (first, last), everywhere = rows_of_rank(parameter)
    assert local(parameter).shape[0] == last - first, f"{name}: FSDP holds {local(parameter).shape}, not {first}:{last}"
    (top, bottom), *others = cut
    rows = (min(top + first, bottom), min(top + last, bottom))
    written = rows[1] > rows[0] and (not everywhere or index % groups.dp_size() == groups.dp_rank())
    copies = groups.mp_size() if dim is None else groups.mp_size() // args.kv_heads if kv_copied(name) else 1
    return Piece((rows, *others), cut, shape, written, written and groups.mp_rank() % max(1, copies) == 0)


def size(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def overlap(one: Box, other: Box) -> Box | None:
    """The box that both share; None without any."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` is in a tensor that holds `outer`."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def with_moments(name: str) -> tuple[str, ...]:
    return name, *(f"{name}/{moment}" for moment in MOMENTS)


def write_state(file: Path, held: dict[str, Piece], names: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    """One rank's file: of each of these parameters that it owns a piece of, that piece and, if `tensors` has them, its
    moments."""
    owned = {name: held[name] for name in names if held[name].owned}
    keys = [key for name in owned for key in with_moments(name) if key in tensors]
    where = {name: {"at": piece.box, "of": piece.shape} for name, piece in owned.items()}
    dtypes = {
        key: torch.bfloat16 if "/" in key and tensors[key].dtype == torch.bfloat16 else torch.float32 for key in keys
    }
    specs = {key: (tuple(tensors[key].shape), dtypes[key]) for key in keys}
    stored = ((key, tensors[key].to("cpu", dtypes[key])) for key in keys)
    write_safetensors(file, specs, stored, {"pieces": json.dumps(where)})


class StateFiles:
    """All files of a resume/ directory as one: the parameters in it, whole, are a `weights.Source`; `fill` copies any box of
    them or of their moments. `trained`: those with moments; the others are frozen parts of an adapter.

    Raises ValueError unless the pieces fit together without gap and overlap."""

    def __init__(self, directory: Path):
        self.directory, self._handles, self._mapped = directory, {}, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[Box, Path]]] = {}
        self.trained: set[str] = set()
        for file in state_files(directory):
            places, trained = read_places(file)
            self.trained |= trained
            for name, (box, shape) in places.items():
                if self._shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{file}: {name} is part of {shape}, in other files of {self._shapes[name]}: {MIXED}"
                    )
                self._places.setdefault(name, []).append((box, file))
        for name, places in self._places.items():
            self._check(name, places)

    def _check(self, name: str, places: list[tuple[Box, Path]]) -> None:
        for (one, file), (other, second) in combinations(places, 2):
            if overlap(one, other):
                raise ValueError(f"{second}: {name} at {other} is also in {file.name}, at {one}: {MIXED}")
        found, whole = sum(size(box) for box, _ in places), prod(self._shapes[name])
        if found != whole:
            files = ", ".join(sorted(file.name for _, file in places))
            raise ValueError(f"{self.directory}: {name} has {found} of {whole} numbers, in {files}: {MIXED}")

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        shape = self._shapes[name]
        box = tuple((start, stop or n) if d == dim else (0, n) for d, n in enumerate(shape))
        out = torch.empty([last - first for first, last in box])
        self.fill(name, box, out)
        return out

    def fill(self, key: str, box: Box, out: Tensor) -> None:
        """Copies `box` of the whole tensor of this key (a parameter's name, or name/exp_avg) into `out`, in place."""
        for place, file in self._places[key.partition("/")[0]]:
            if (common := overlap(place, box)) is not None:
                part = self._handle(file, size(common)).get_slice(key)[within(common, place)]
                out[within(common, box)].copy_(part)

    def _handle(self, file: Path, numbers: int):
        from safetensors import safe_open

        self._mapped += 4 * numbers
        if self._mapped > MAPPED_LIMIT:  # let go of the pages that were read
            self._handles, self._mapped = {}, 0
        if file not in self._handles:
            self._handles[file] = safe_open(file, "pt")
        return self._handles[file]


def state_files(directory: Path) -> list[Path]:
    """The ranks' files, by rank. Raises ValueError naming the one that is missing or one too many."""
    found = {file.name: file for file in directory.glob("state-*.safetensors")}
    counts = sorted({int(m[2]) for name in found if (m := STATE_FILE.fullmatch(name))})
    if not counts:
        raise ValueError(f"{directory}: holds no state-*.safetensors: the checkpoint is incomplete")
    wanted = [state_name(rank, counts[0]) for rank in range(counts[0])]
    if stray := sorted(found.keys() - set(wanted)):
        raise ValueError(f"{directory / stray[0]}: does not belong to {wanted[0]}: {MIXED}")
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{directory / missing[0]} is missing")
    return [found[name] for name in wanted]


def state_name(rank: int, world: int) -> str:
    return f"state-{rank:05d}-of-{world:05d}.safetensors"


def read_places(file: Path) -> tuple[dict[str, tuple[Box, tuple[int, ...]]], set[str]]:
    """({name: (box, shape of the whole)}, the names with moments) of one rank's file, checked against its tensors, none of
    which is read."""
    from safetensors import safe_open

    header = safetensors_header(file)
    try:
        with safe_open(file, "pt") as handle:
            where = json.loads((handle.metadata() or {})["pieces"])
        places = {n: (tuple((int(a), int(b)) for a, b in w["at"]), tuple(map(int, w["of"]))) for n, w in where.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {DAMAGED} (its pieces are not described: {error})") from None
    trained = {key.partition("/")[0] for key in header if "/" in key}
    expected = {key: name for name in places for key in (with_moments(name) if name in trained else (name,))}
    if odd := sorted(header.keys() ^ expected.keys()):
        raise ValueError(f"{file}: {DAMAGED} ({odd[0]} is in its list of pieces or among its tensors, not in both)")
    for key, name in expected.items():
        box, shape = places[name]
        kinds = ("F32", "BF16") if "/" in key else ("F32",)  # moments as --optim_states holds them
        inside = len(box) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(box, shape))
        if not inside or header[key]["shape"] != [b - a for a, b in box] or header[key]["dtype"] not in kinds:
            raise ValueError(f"{file}: {DAMAGED} ({key} is {header[key]['shape']}, its place {box} of {shape})")
    return places, trained
