"""Checkpoints are written while training goes on, sharded, whole or not at all.

    training thread     copies this rank's pieces to host memory ......... the next steps ...  learns how the save ended
    saving thread       lays files out | writes its parts | hashes | manifest.json, rename, `latest`, retention (rank 0)
                                       ^ after each of these the ranks' saving threads meet, on a group of their own

    step_N.tmp-<id>/  files, fsync  ->  manifest.json (size, sha256 of every file) last  ->  rename  ->  latest  ->  retention

One save is in flight at a time. What goes wrong on one rank is known to all when their threads meet, and raised by every
training thread together, in `finish`; the earlier checkpoints are untouched. Test: tests/dist/test_resume.py.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Callable, Protocol

import torch
from torch import Tensor, nn

from accessory import log
from accessory.checkpoint.formats_read import file_sha256
from accessory.checkpoint.formats_write import sync
from accessory.checkpoint.pieces import MOMENTS, Piece, pieces, state_name, write_state
from accessory.checkpoint.resume import FORMAT_VERSION, MANIFEST, STATE, digest, moments_of, retire
from accessory.parallel import groups
from accessory.parallel.fsdp import local

PAGE = 4096  # bytes; the kernel finds memory for a page when it is first written to
AT_THE_END = 300  # seconds that a run which ends with an error waits for the save that is being written


class Beside(Protocol):
    """What a checkpoint holds beside resume/. The saving threads of all ranks call these, and meet after each."""

    def about(self) -> dict[str, Any]:
        """Further keys for the manifest. Rank 0 only. Its ValueError is raised as it is."""

    def lay_out(self, directory: Path) -> Any:
        """Makes files that several ranks will fill; what is returned goes to all."""

    def write(self, directory: Path, layouts: list[Any], held: dict[str, Piece], tensors: dict[str, Tensor]) -> None:
        """This rank's parts. `layouts`: of every rank; `tensors`: of every piece that is `written`."""

    def complete(self, directory: Path, step: int) -> list[Path]:
        """After all have written, also resume/: the files that this rank answers for, complete."""


class Snapshot:
    """This rank's pieces of the trained parameters and of their moments, copied to host memory that is kept and reused, and
    of the frozen parameters as they are.

    The memory is made by a thread while training begins: the first touch of it takes many times as long as a copy."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer, self.held = model, optimizer, pieces(model)
        self.tensors: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None
        buffers, device = list(self._buffers()), groups.device()
        self.maker = threading.Thread(target=self._make, args=(buffers, device), name="buffers", daemon=True)
        self.maker.start()

    def _buffers(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, bool]]:
        """Key, shape, dtype of what `take` will copy, and whether it is on a GPU."""
        dtype_of = getattr(self.optimizer, "moment_dtype", lambda p: p.dtype)
        for name, parameter in self.model.named_parameters():
            piece = self.held.get(name)
            if parameter.requires_grad and piece is not None and piece.written:
                shape = (piece.rows, *local(parameter.detach()).shape[1:])
                yield name, shape, parameter.dtype, parameter.is_cuda
                if piece.owned:
                    yield from ((f"{name}/{m}", shape, dtype_of(parameter), parameter.is_cuda) for m in MOMENTS)

    def _make(self, buffers: list[tuple[str, tuple[int, ...], torch.dtype, bool]], device: torch.device) -> None:
        _use(device)
        for key, shape, dtype, pinned in buffers:
            try:
                self.tensors[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            except RuntimeError:  # no memory: `take` tries again, and raises where it is heard
                return
            self.tensors[key].view(-1)[:: PAGE // dtype.itemsize] = 0

    @torch.no_grad()
    def take(self) -> float:
        """Copies; returns AdamW's own step. On a GPU the copies are queued on the stream that the optimizer's next step is
        queued on, so it waits for them and the host does not; `ready` does. The frozen do not change: no copy of them."""
        self.maker.join()
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        some = moments_of(next(iter(trained.values())), self.optimizer)
        adam_step = some["step"].item()  # the same for all; read before the copies are queued
        for name, parameter in self.model.named_parameters():
            if (piece := self.held.get(name)) is None:
                continue
            mine = local(parameter.detach())[: piece.rows]
            if piece.written and name in trained:
                self._copy(name, mine)
                moments = moments_of(parameter, self.optimizer) if piece.owned else {}
                for moment in MOMENTS if piece.owned else ():
                    self._copy(f"{name}/{moment}", local(moments[moment])[: piece.rows])
            elif piece.written:
                self.tensors[name] = mine
        if groups.device().type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()
        return adam_step

    def _copy(self, key: str, tensor: Tensor) -> None:
        held = self.tensors.get(key)
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            self.tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.tensors[key].copy_(tensor, non_blocking=True)

    def ready(self) -> None:
        """Waits for the copies."""
        if self.copied is not None:
            self.copied.synchronize()

    def nbytes(self) -> int:
        """Of this rank's file in resume/."""
        owned = {key.partition("/")[0] for key in self.tensors if "/" in key}
        return sum(t.nbytes for key, t in self.tensors.items() if key.partition("/")[0] in owned)


class Saver:
    """The checkpoints of one run, written by a thread. Every rank makes one, and calls all but `failed` and `settle` alike.

    `names`: what resume/ holds, the trained parameters and the frozen parts of an adapter; `keep_last`: how many newest
    checkpoints stay, None keeps all."""

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        beside: Beside,
        keep_last: int | None,
    ):
        self.run, self.names, self.beside, self.keep_last = run, names, beside, keep_last
        self.snapshot, self.group, self.device = Snapshot(model, optimizer), groups.save_group(), groups.device()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, step: int, state: dict[str, Any], keep: Collection[int] = ()) -> None:
        """Begins to save `step_N`: complete or not at all. Returns when the model may change again; first waits for the
        save before it. `state`: plain JSON, kept with it; the steps `keep` are not retired."""
        self.finish()
        state = state | {"adam_step": self.snapshot.take(), "format_version": FORMAT_VERSION}
        self.thread = threading.Thread(target=self._run, args=(step, state, tuple(keep)), name=f"saving step {step}")
        self.thread.start()

    def failed(self) -> bool:
        """Whether this rank knows that the save in flight has failed. Not collective."""
        return self.error is not None

    def finish(self) -> None:
        """Waits until the save in flight, if any, is published. Raises on all ranks when it failed on one."""
        if self.thread is not None:
            self.thread.join()
            self.thread, error, self.error = None, self.error, None
            groups.together(error)

    def settle(self) -> None:
        """Before a run ends with an error: lets this rank's thread come to its end, however. Not collective."""
        if self.thread is not None:
            self.thread.join(AT_THE_END)

    def _run(self, step: int, state: dict[str, Any], keep: Collection[int]) -> None:
        try:
            _use(self.device)
            self._save(step, state, keep)
        except BaseException as error:  # for the training thread, which raises it
            self.error = error

    def _save(self, step: int, state: dict[str, Any], keep: Collection[int]) -> None:
        final = self.run / f"step_{step:08d}"
        about = self._meet(lambda: self.beside.about() if groups.rank() == 0 else None)[0]
        name = self._meet(lambda: f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")[0]
        temporary, needed = self.run / name, self._meet(self.snapshot.nbytes)

        def part(work: Callable[[], Any]) -> list[Any]:
            return self._part(work, temporary, final)

        def write() -> None:
            self.snapshot.ready()
            self.beside.write(temporary, layouts, self.snapshot.held, self.snapshot.tensors)
            write_state(own, self.snapshot.held, self.names, self.snapshot.tensors)

        def seal() -> dict[str, dict[str, Any]]:
            files = [*self.beside.complete(temporary, step), own]
            if groups.rank() == 0:
                (temporary / "resume" / STATE).write_text(json.dumps(state, indent=1))
                files.append(temporary / "resume" / STATE)
            return {str(f.relative_to(temporary)): _seal(f) for f in files}

        def publish() -> None:
            if groups.rank() == 0:
                layout = {"mp": groups.mp_size(), "dp": groups.dp_size(), "metrics": state.get("metrics", {})}
                manifest = {"format_version": FORMAT_VERSION, "step": step, **layout, **about}
                manifest["files"] = {name: entry for part in files for name, entry in sorted(part.items())}
                _publish(self.run, temporary, final, manifest)
                retire(self.run, self.keep_last, keep, step)

        own = temporary / "resume" / state_name(groups.rank(), groups.world_size())
        part(lambda: _make_room(self.run, temporary, sum(needed) * 4 / 3))  # and the weights
        layouts = part(lambda: self.beside.lay_out(temporary))
        part(write)
        files = part(seal)
        part(publish)
        log.say(f"step {step}: saved {final}", groups.rank())

    def _meet(self, work: Callable[[], Any]) -> list[Any]:
        """What `work()` gives on every rank, by rank. Where it fails on some rank, all raise."""
        error, result = None, None
        try:
            result = work()
        except (OSError, RuntimeError, ValueError) as failed:
            error = failed
        return groups.together(error, result, self.group)

    def _part(self, work: Callable[[], Any], temporary: Path, final: Path) -> list[Any]:
        """One part of the save; a failure takes what was written away, and says that nothing is lost."""

        def readable() -> Any:
            try:
                return work()
            except (OSError, RuntimeError, ValueError) as failed:
                raise _readable(failed, self.run, final) from failed

        try:
            return self._meet(readable)
        except ValueError:
            if groups.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def _use(device: torch.device) -> None:
    """At the start of a thread: else pinning, and waiting for an event, would open GPU 0 for every rank, and take memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _make_room(run: Path, temporary: Path, needed: float) -> None:
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
    reason = f"{failed}".strip().splitlines()[0] if f"{failed}".strip() else type(failed).__name__
    begun, untouched = f"--output_dir: saving {final} failed: {reason}", "earlier checkpoints are untouched"
    if isinstance(failed, ValueError):  # which names its remedy
        return ValueError(f"{begun}; {untouched}, and the same command continues from them")
    try:
        free = f"{shutil.disk_usage(run).free / 1e6:,.0f} MB free there; "
    except OSError:
        free = ""
    return ValueError(f"{begun}; {free}{untouched}: make room, then run the same command to continue from them")


def _publish(run: Path, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    part = temporary / MANIFEST
    part.write_text(json.dumps(manifest | {"sha256": digest(manifest)}, indent=1, sort_keys=True))
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
