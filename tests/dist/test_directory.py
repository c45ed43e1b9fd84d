"""--output_dir over several nodes: one directory on storage that they share, under whatever name, or the run does not begin."""

import errno
import os
from pathlib import Path

import pytest

from accessory.parallel import groups
from accessory.train import directory
from accessory.train.start import RunArgs
from tests.helpers import run_ranks


def refuse(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def claims(paths: list[Path], read_only: bool = False) -> str:
    """What this rank is told of its own path, which may be read-only on the second, and what was left in it."""
    directory.SEEN_WITHIN = 1
    try:
        with pytest.MonkeyPatch.context() as patched:
            if read_only and groups.rank() == 1:
                patched.setattr(Path, "touch", refuse)
            directory.claim_shared(paths[groups.rank()])
    except ValueError as error:
        return str(error)
    finally:
        directory._claimed.clear()
    groups.barrier()
    return " ".join(sorted(p.name for p in paths[groups.rank()].iterdir()))


def test_a_directory_that_the_nodes_do_not_share_is_refused_before_the_run(tmp_path):
    """Each would have its own ranks' files of a checkpoint, and neither a whole one."""
    own = [tmp_path / "a", tmp_path / "b"]
    own[1].mkdir()
    first, second = run_ranks(claims, own, world=2)
    assert second.startswith(f"--output_dir {own[1]}: on ") and "storage that the nodes share" in second
    assert first == f"rank 1: {second}"
    (tmp_path / "mounted").symlink_to("a")
    (tmp_path / "a" / ".seen-01234567").touch()  # a run was killed there
    assert run_ranks(claims, [own[0], tmp_path / "mounted"], world=2) == [".lock"] * 2


def test_a_node_that_cannot_write_there_is_named(tmp_path):
    first, second = run_ranks(claims, [tmp_path / "a"] * 2, True, world=2)
    assert "Read-only file system on " in second and first == f"rank 1: {second}"
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".lock"]


def finds(paths: list[Path], wanted: str) -> str:
    directory.SEEN_WITHIN = 1
    mine = paths[groups.rank()]
    try:
        return str(directory.find_start(RunArgs(pretrained_path="x", output_dir=str(mine), resume=wanted), mine))
    except ValueError as error:
        return str(error)
    finally:
        directory._claimed.clear()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    from accessory.checkpoint.save import _publish

    (tmp_path / "a" / "tmp" / "resume").mkdir(parents=True)
    _publish(tmp_path / "a", tmp_path / "a" / "tmp", tmp_path / "a" / "step_00000004", {"files": {}})
    return tmp_path / "a"


def test_each_node_goes_on_from_the_checkpoint_by_its_own_name(published, tmp_path):
    """One that does not see it says so, as all do; it would have been left alone with a FileNotFoundError."""
    (tmp_path / "b").mkdir()
    first, second = run_ranks(finds, [published, tmp_path / "b"], "auto", world=2)
    assert f"{tmp_path / 'b' / 'step_00000004'} is not there on " in second and first == f"rank 1: {second}"
    (tmp_path / "b").rmdir()
    (tmp_path / "b").symlink_to("a")
    assert run_ranks(finds, [published, tmp_path / "b"], "auto", world=2) == [str(published / "step_00000004")] * 2
