"""A run's checkpoints: written whole or not at all, resumed exactly.

    output/<exp>/step_00000100/  manifest.json  params.json  tokenizer.*   weights or adapter files   resume/ (state)
                 latest -> step_00000100

    step_N.tmp-<id>/  files, fsync  ->  manifest.json (size, sha256 of every file) last  ->  rename  ->  latest  ->  retention

A directory without a manifest, or whose files have other sizes than it says, does not exist for us. resume/ holds every
trained parameter (fp32) and the optimizer's moments through torch.distributed.checkpoint, as 2-D DTensors on ("dp", "mp"):
without that view DCP takes the mp ranks' tensors of one name for copies, keeps one and says nothing.
Test: tests/dist/test_resume.py, tests/e2e/test_resume.py.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from accessory.checkpoint.formats_read import file_sha256
from accessory.checkpoint.formats_write import sync
from accessory.model.llama import shard_dim
from accessory.parallel import groups

MANIFEST, STATE, FORMAT_VERSION = "manifest.json", "state.json", 1
STEP = re.compile(r"step_(\d{8})")


def as_global(name: str, tensor: DTensor) -> DTensor:
    """A parameter, or an optimizer state of its shape, seen as one tensor on ("dp", "mp"), sharing its memory.

    Copies of kv heads and padding rows count as rows of their own: what is saved is what each rank holds.
    `_StridedShard` is private torch API: mp cut dim 0 first and dp cut the result again, so a dp rank's rows are not
    contiguous in the whole."""
    dim, mesh = (
        shard_dim(name),
        groups.mesh(tensor.to_local().device.type),
    )  # the CPU's under --cpu_offload: another would copy
    mp, shape = groups.mp_size(), list(tensor.shape)
    if dim is not None:
        shape[dim] *= mp
    if tensor.device_mesh.ndim == 2:  # ddp: every dp rank holds its whole slice
        placements = [Replicate(), Replicate() if dim is None else Shard(dim)]
    elif dim is None:
        placements = [Shard(0), Replicate()]
    elif dim == 0 and mp > 1:
        placements = [_StridedShard(0, split_factor=mp), Shard(0)]
    else:
        placements = [Shard(0), Shard(dim)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor.to_local(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, DTensor], float]:
    """({key: view of every trained parameter and its moments}, AdamW's own step). Makes moments that are not there yet."""
    state, step = {}, torch.zeros(())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.to_local().device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        step = moments["step"]  # the same for all
        state[name] = as_global(name, parameter.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}/{key}"] = as_global(name, moments[key].detach())
    return state, step.item()


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    write_weights: Callable[[Path], Iterable[Path]],
    about: dict[str, Any],
    keep_last: int | None,
    keep_step: int | None,
) -> Path:
    """Writes `step_N`, complete or not at all, then retires old ones. Every rank calls it; all fail together.

    `write_weights(directory)` writes this rank's share of what goes beside resume/ and returns the files it wrote; it is
    collective. `about`: further keys for the manifest. `keep_last`: None keeps all; `keep_step` is never retired."""
    final = run / f"step_{step:08d}"
    temporary = Path(groups.broadcast_object(str(run / f"step_{step:08d}.tmp-{uuid.uuid4().hex[:8]}")))
    resume = temporary / "resume"
    views, adam_step = trained_state(model, optimizer)

    def together(part: Callable[[], Any]) -> Any:
        """One part of the save. Where it fails on some rank, all raise before any goes on to the next collective."""
        error, result = None, None
        try:
            result = part()
        except (OSError, RuntimeError, ValueError, CheckpointException) as failed:  # the last is a BaseException
            error = _readable(failed, run, final)
        try:
            groups.together(error)
        except ValueError:
            if groups.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return result

    def seal() -> dict[str, dict[str, Any]]:
        files = [*written, *sorted(resume.glob(f"__{groups.rank()}_*"))]
        if groups.rank() == 0:
            (resume / STATE).write_text(
                json.dumps(state | {"adam_step": adam_step, "format_version": FORMAT_VERSION}, indent=1)
            )
            files += [resume / STATE, resume / ".metadata"]
        return {str(f.relative_to(temporary)): _seal(f) for f in files}

    def publish() -> None:
        if groups.rank() == 0:
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "mp": groups.mp_size(),
                "dp": groups.dp_size(),
                **about,
            }
            manifest["files"] = {name: entry for part in everyone for name, entry in sorted(part.items())}
            _publish(run, temporary, final, manifest)
            retire(run, keep_last, keep_step)

    needed = sum(groups.all_gather_object(sum(v.to_local().nbytes for v in views.values()))) * 4 / 3  # and the weights
    together(lambda: _make_room(run, temporary, needed))
    written = together(lambda: list(write_weights(temporary)))
    together(
        lambda: dcp.save(views, storage_writer=dcp.FileSystemWriter(resume, single_file_per_rank=True, thread_count=1))
    )
    everyone = groups.all_gather_object(together(seal))
    together(publish)
    return final


def _make_room(run: Path, temporary: Path, needed: int) -> None:
    """Makes the directory, and raises OSError before anything is written when the disk cannot take `needed` bytes."""
    run.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(f"{run}: {free / 1e6:,.0f} MB free, this checkpoint needs about {needed / 1e6:,.0f}")
    (temporary / "resume").mkdir(parents=True, exist_ok=True)


def _seal(file: Path) -> dict[str, Any]:
    """Forces the file to disk; its size and sha256."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}


def _readable(failed: BaseException, run: Path, final: Path) -> ValueError:
    """One line: what could not be saved, why, and that nothing is lost."""
    if isinstance(failed, CheckpointException):
        failed = next(iter(failed.failures.values()))[0]
    reason = f"{failed}".strip().splitlines()[0] if f"{failed}".strip() else type(failed).__name__
    try:
        free = f"{shutil.disk_usage(run).free / 1e6:,.0f} MB free there; "
    except OSError:
        free = ""
    return ValueError(
        f"--output_dir: saving {final} failed: {reason}; {free}earlier checkpoints are untouched: make room, then run the same command to continue from them"
    )


def _publish(run: Path, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    part = temporary / MANIFEST
    part.write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1, sort_keys=True))
    _seal(part)
    sync(temporary / "resume")
    sync(temporary)
    if final.exists():  # an unbroken rerun of the same step: the new one takes its place
        os.replace(final, run / f".trash-{uuid.uuid4().hex[:8]}")
    os.replace(temporary, final)
    sync(run)
    link = run / f".latest-{uuid.uuid4().hex[:8]}"
    link.symlink_to(final.name)
    os.replace(link, run / "latest")
    sync(run)


def _digest(manifest: dict[str, Any]) -> str:
    """Of the manifest itself, so that a flipped bit in it is its own fault and not that of a file it lists."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def retire(run: Path, keep_last: int | None, keep_step: int | None) -> None:
    """Deletes all but the newest `keep_last` whole checkpoints and `keep_step`, and what interrupted saves left. One rank."""
    if keep_last is not None:
        whole = [(step, path) for step, path in steps(run) if problem(path) is None]
        for step, path in whole[: max(0, len(whole) - max(1, keep_last))]:
            if step != keep_step:
                os.replace(path, run / f".trash-{uuid.uuid4().hex[:8]}")
    for left in [*run.glob(".trash-*"), *run.glob("step_*.tmp-*")]:
        shutil.rmtree(left, ignore_errors=True)


def retire_all(run: Path) -> None:
    """Removes a run's checkpoints and metrics, for a run that starts anew in its directory. One rank."""
    for _, path in steps(run):
        os.replace(path, run / f".trash-{uuid.uuid4().hex[:8]}")
    for name in ("latest", "metrics.jsonl", "samples.jsonl"):
        (run / name).unlink(missing_ok=True)
    retire(run, None, None)


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every published checkpoint, oldest first."""
    return sorted((int(m[1]), p) for p in run.glob("step_*") if (m := STEP.fullmatch(p.name)))


def problem(path: Path, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint directory, naming the file; None when it is whole (with `hashes`: byte for byte)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        intact = manifest.pop("sha256") == _digest(manifest)
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing: the save was interrupted"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"{path / MANIFEST} is damaged"
    for name, entry in manifest["files"].items():
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            return f"{path / MANIFEST} names {name}, outside the checkpoint"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{file} has {file.stat().st_size} bytes, {entry['size']} were written"
        if hashes and file_sha256(file) != entry["sha256"]:
            return f"{file} is damaged: its sha256 is not the one written"
    return None


def find(run: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """--resume's checkpoint and what was passed over: "auto" is the newest whole one of `run`, None without any;
    else the directory named. Raises ValueError when that is not whole, or when no checkpoint of `run` is."""
    if wanted != "auto":
        path = Path(wanted)
        path = path / "latest" if (path / "latest").exists() else path
        if not path.is_dir():
            raise ValueError(f"--resume {wanted}: no such checkpoint directory")
        if (wrong := problem(path, hashes=True)) is not None:
            raise ValueError(
                f"--resume {wanted}: {wrong}; name another step_* directory, or use --resume auto for the newest whole one"
            )
        return path.resolve(), []
    passed_over = []
    for _, path in reversed(steps(run)):
        if (wrong := problem(path, hashes=True)) is None:
            return path.resolve(), passed_over
        passed_over.append(wrong)
    if passed_over:
        raise ValueError(
            f"--resume auto: no whole checkpoint in {run}: {passed_over[0]}; start again with --overwrite_output_dir true, or restore the file"
        )
    return None, []


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills trained parameters and moments in place from `path`; returns the state saved with them. Every rank calls it."""
    state = json.loads((path / "resume" / STATE).read_text())
    _check_pickle(path / "resume" / ".metadata")
    views, _ = trained_state(model, optimizer)
    try:
        dcp.load(views, storage_reader=dcp.FileSystemReader(path / "resume"))
    except CheckpointException as failed:
        cause = next(iter(failed.failures.values()))[0]
        raise ValueError(
            f"--resume {path}: does not fit this run ({str(cause).splitlines()[0]}): resume with the flags it was saved with"
        ) from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["step"].fill_(state["adam_step"])
    return state


class _PlainData(pickle.Unpickler):
    """Reads DCP's .metadata if it holds nothing but descriptions of tensors: the format is a raw pickle."""

    DCP = (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
    NAMES = {
        *(("torch.distributed.checkpoint.metadata", name) for name in DCP),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
        ("torch", "Size"), ("torch", "float32"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) not in self.NAMES:
            raise ValueError(f"{module}.{name}")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    """What getattr may do here: Python before 3.11.4 pickles an enum's member as getattr(the enum, its name)."""
    if owner is not _MEM_FORMAT_ENCODING or name not in owner.__members__:
        raise ValueError(f"getattr of {name!r}")
    return owner[name]


def _check_pickle(file: Path) -> None:
    with open(file, "rb") as handle:
        try:
            _PlainData(handle).load()
        except Exception as error:  # a damaged pickle fails in many ways
            raise ValueError(
                f"{file}: holds more than descriptions of tensors ({error}): it was not written by a run of this library, do not load it"
            ) from None
