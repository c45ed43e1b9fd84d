"""Which checkpoints of a run are whole, and how one is continued, on whatever layout. save.py writes them.

    output/<exp>/step_00000100/  manifest.json  params.json  tokenizer.*   weights or adapter files   resume/ (state)
                 latest -> step_00000100

    resume/  state.json                              position, AdamW's step, format_version
             state-00000-of-00004.safetensors ...    trained parameters and moments, as pieces (pieces.py)

A directory without a manifest, or whose files have other sizes than it says, does not exist for us.
Test: tests/dist/test_resume.py, tests/dist/test_any_layout.py, tests/e2e/test_resume.py.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.checkpoint.formats_read import file_sha256, read_json
from accessory.checkpoint.pieces import MOMENTS, StateFiles, pieces
from accessory.parallel import groups
from accessory.parallel.fsdp import local

MANIFEST, STATE, FORMAT_VERSION = "manifest.json", "state.json", 2
STEP = re.compile(r"step_(\d{8})")


def digest(manifest: dict[str, Any]) -> str:
    """Of the manifest itself, so that a flipped bit in it is its own fault and not that of a file it lists."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def retire(run: Path, keep_last: int | None, keep: Collection[int] = (), newest: int | None = None) -> None:
    """Deletes all but the newest `keep_last` whole checkpoints and the steps `keep`, and what interrupted saves left. One
    rank. `newest`: the step that was just saved. Later ones were passed over as damaged, which sizes alone do not show: they
    stay, and count as none."""
    if keep_last is not None:
        known = [(step, path) for step, path in steps(run) if newest is None or step <= newest]
        whole = [(step, path) for step, path in known if problem(path) is None]
        for step, path in whole[: max(0, len(whole) - max(1, keep_last))]:
            if step not in keep:
                os.replace(path, run / f".trash-{uuid.uuid4().hex[:8]}")
    for left in [*run.glob(".trash-*"), *run.glob("step_*.tmp-*")]:
        shutil.rmtree(left, ignore_errors=True)


def retire_all(run: Path) -> None:
    """Removes a run's checkpoints and metrics, for a run that starts anew in its directory. One rank."""
    for _, path in steps(run):
        os.replace(path, run / f".trash-{uuid.uuid4().hex[:8]}")
    for name in ("latest", "metrics.jsonl", "samples.jsonl", "timing.jsonl"):
        (run / name).unlink(missing_ok=True)
    retire(run, None)


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every published checkpoint, oldest first."""
    return sorted((int(m[1]), p) for p in run.glob("step_*") if (m := STEP.fullmatch(p.name)))


def problem(path: Path, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint directory, naming the file; None when it is whole (with `hashes`: byte for byte)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        intact = manifest.pop("sha256") == digest(manifest)
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
    else the directory named. Raises ValueError when that is not whole, when no checkpoint of `run` is, or when `run` has
    whole ones after the one named: the next "auto" would take those, and retention them for the newest."""
    if wanted != "auto":
        path = Path(wanted)
        path = path / "latest" if (path / "latest").exists() else path
        if not path.is_dir():
            raise ValueError(f"--resume {wanted}: no such checkpoint directory")
        if (wrong := problem(path, hashes=True)) is not None:
            raise ValueError(
                f"--resume {wanted}: {wrong}; name another step_* directory, or use --resume auto for the newest whole one"
            )
        named, path = STEP.fullmatch(path.name), path.resolve()  # `latest` may lag a step behind after a kill
        later = [p for _, p in steps(run) if path.parent == run.resolve() and p.name > path.name and problem(p) is None]
        if named and later:
            raise ValueError(
                f"--resume {wanted}: {later[-1]} comes after it: move away what is beyond {path.name}, or go on in another --output_dir"
            )
        return path, []
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
    """Fills trained parameters and moments in place from `path`, saved on whatever layout; returns the state saved with them.

    Every rank calls it; all raise ValueError where one cannot read, or where the state is not that of this model."""
    error, state = None, {}
    try:
        state = _load(path, model, optimizer)
    except (OSError, ValueError) as failed:
        error = failed
    groups.together(error)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state that was saved with the checkpoint `path`. Raises ValueError where this version cannot continue from it."""
    state = read_json(path / "resume" / STATE)
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"--resume {path}: its state is of format {state.get('format_version')}, this version reads {FORMAT_VERSION}: finish "
            "the run with the version that saved it, or start anew from its weights in another --output_dir"
        )
    return state


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state, files, held = read_state(path), StateFiles(path / "resume"), pieces(model)
    parameters = dict(model.named_parameters())
    _check_names(path, files, {n: held[n].shape for n in held}, {n for n, p in parameters.items() if p.requires_grad})
    for name in files.names():
        piece, tensors = held[name], {name: parameters[name].detach()}
        if name in files.trained:
            parameter = parameters[name]
            moments = moments_of(parameter, optimizer)
            moments["step"].fill_(state["adam_step"])
            tensors |= {f"{name}/{m}": moments[m] for m in MOMENTS}
        for key, tensor in tensors.items():
            mine = local(tensor)
            mine[piece.rows :] = 0  # padding
            files.fill(key, piece.box, mine[: piece.rows])
        if name in files.trained and hasattr(optimizer, "keep"):
            optimizer.keep(parameter, moments)
    return state


def _check_names(path: Path, files: StateFiles, shapes: dict[str, tuple[int, ...]], trained: set[str]) -> None:
    """Raises ValueError naming a parameter that is trained there and not here, or the other way, or has another shape."""
    saved = {name: files.shape(name) for name in files.names()}
    odd = sorted(trained ^ files.trained) + sorted(n for n in saved if saved[n] != shapes.get(n))
    for name in odd[:1]:
        there = f"{saved[name]}" if name in files.trained else "not trained"
        here = f"{shapes[name]}" if name in trained else "not trained"
        raise ValueError(
            f"--resume {path}: does not fit this run ({name} is {there} in it, {here} now): resume with the flags it was saved with"
        )


def moments_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of a parameter; made, of zeros, where there was no step yet. Of moments in 8 bits, a copy in fp32, which
    `optimizer.keep` takes back."""
    if hasattr(optimizer, "moments"):
        return optimizer.moments(parameter)
    moments = optimizer.state[parameter]
    if not moments:
        moments["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
        moments |= {m: torch.zeros_like(parameter.detach()) for m in MOMENTS}
    return moments
