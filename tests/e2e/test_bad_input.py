"""Bad input, each kind through the script or the launcher of a real run: one line, once and last, that names what is wrong
and what to do; exit code not 0, every rank gone soon, and not one file changed.

Every case has its own copy of a tiny checkpoint in two shards, its data, and a LoRA run of four steps that the command
would continue. Cases of one rank run two at a time in the background, in the order in which the tests will ask for them.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import resume
from accessory.checkpoint.adapter import open_adapter
from accessory.checkpoint.formats import open_checkpoint
from tests.e2e.launches import Done, Launch, as_flags, hashes, launch_line
from tests.helpers import tiny_args, write_tiny_checkpoint, write_tiny_data

GONE_WITHIN = 30  # seconds from the first rank's error to the end of all
BASE_STEPS = 4
SETTINGS = {
    "precision": "fp32",
    "checkpointing": "false",
    "batch_size": 2,
    "accum_iter": 1,
    "save_steps": 2,
    "eval_steps": 100,
    "max_seq_len": 256,
}


@dataclass
class Place:
    """One case's files, and what its command gets beside the defaults."""

    root: Path
    flags: dict[str, object] = field(default_factory=dict)  # given after the script's own
    variables: dict[str, object] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def data(self) -> Path:
        return self.root / "data" / "train.jsonl"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def step(self) -> Path:
        return self.run / f"step_{BASE_STEPS:08d}"

    def command(self, name: str, ranks: int) -> tuple[list[str], dict[str, object]]:
        """A script with everything in variables; by name the module itself, where the script would give the flag."""
        paths = {
            "pretrained_path": self.checkpoint,
            "data_config": self.data.with_name("data.yaml"),
            "output_dir": self.run,
        }
        if name in WITHOUT_SCRIPT:
            given = paths | {"lora_rank": 4, "max_steps": 6} | SETTINGS | self.flags
            return launch_line(*as_flags({k: v for k, v in given.items() if v is not None}), ranks=ranks), {}
        script = "exps/finetune_7b.sh" if name in FULL else "exps/finetune_lora_7b.sh"
        variables = (
            paths | SETTINGS | {"lora_rank": 4, "max_steps": 6, "nproc_per_node": ranks, "model_parallel": ranks}
        )
        return ["bash", script, *as_flags(self.flags)], variables | self.variables


# --- what is spoilt: each returns what the message must hold ----------------------------------------------------------


def missing_first_shard(at: Place) -> list[str]:
    (at.checkpoint / "consolidated.00.pth").unlink()
    return [str(at.checkpoint), "consolidated.00.pth is missing", "copy it too"]


def missing_last_shard(at: Place) -> list[str]:
    (at.checkpoint / "consolidated.01.pth").unlink()
    return [f"{at.checkpoint} does not fit", "tok_embeddings.weight", "every shard is there and no other"]


def extra_shard(at: Place) -> list[str]:
    shutil.copy(at.checkpoint / "consolidated.01.pth", at.checkpoint / "consolidated.02.pth")
    return [f"{at.checkpoint} does not fit", "tok_embeddings.weight", "every shard is there and no other"]


def truncated_shard(at: Place) -> list[str]:
    file = at.checkpoint / "consolidated.01.pth"
    os.truncate(file, file.stat().st_size * 6 // 10)
    return [str(file), "truncated or damaged", "copy or download it again"]


def shard_of_noise(at: Place) -> list[str]:
    file = at.checkpoint / "consolidated.00.pth"
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))
    return [str(file), "not a torch checkpoint", "copy or download it again"]


def flipped_bytes_in_the_zip_directory(at: Place) -> list[str]:
    file = at.checkpoint / "consolidated.01.pth"
    content = bytearray(file.read_bytes())
    first = content.rindex(b"PK\x01\x02")  # a record of the central directory
    content[first : first + 46] = bytes(b ^ 0xFF for b in content[first : first + 46])
    file.write_bytes(content)
    return [str(file), "damaged", "copy or download it again"]


def pickle_with_code(at: Place) -> list[str]:
    file, canary = at.checkpoint / "consolidated.01.pth", at.root.parent / "canary"

    class Code:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {canary}",)

    content = torch.load(file, weights_only=True)
    torch.save(content | {"layers.0.attention.wq.weight": Code()}, file)
    return [str(file), "could run code", "refused", "copy it again"]


def wrong_shape(at: Place) -> list[str]:
    config = at.root / "data" / "other.json"
    config.write_text(json.dumps(json.loads((at.checkpoint / "params.json").read_text()) | {"hidden_dim": 96}))
    at.variables["llama_config"] = config
    return [str(at.checkpoint), "layers.0.feed_forward.w1.weight [72, 48], not [96, 48]", "check --llama_config"]


def model_parallel_that_n_heads_forbids(at: Place) -> list[str]:
    shutil.rmtree(at.checkpoint)
    write_tiny_checkpoint(at.checkpoint, tiny_args(n_heads=3, n_kv_heads=3, vocab_size=320))
    return ["--model_parallel_size 2", "n_heads is 3", "use 1 or 3"]


def world_that_is_no_multiple(at: Place) -> list[str]:
    at.variables["model_parallel"] = 3
    return ["--model_parallel_size 3", "2 running", "use 1 or 2", "--nproc_per_node"]


def tokenizer_of_another_model(at: Place) -> list[str]:
    shutil.rmtree(at.checkpoint)
    write_tiny_checkpoint(at.checkpoint, tiny_args(vocab_size=101))
    return [
        "--tokenizer_path",
        str(at.checkpoint / "tokenizer.model"),
        "320 tokens",
        "101 rows",
        "name the checkpoint's own",
    ]


def malformed_line(at: Place) -> list[str]:
    lines = at.data.read_text().splitlines()
    lines[6] = lines[6][:-2]
    at.data.write_text("\n".join(lines) + "\n")
    return [f"{at.data}:7", "not valid JSON", "repair or remove the line"]


def empty_data(at: Place) -> list[str]:
    at.data.write_text("\n")
    return [str(at.data), "empty"]


def too_long_example(at: Place) -> list[str]:
    lines = at.data.read_text().splitlines()
    lines[4] = json.dumps({"instruction": "Count.", "output": "one two three " * 90})
    at.data.write_text("\n".join(lines) + "\n")
    at.flags["on_long"] = "error"
    return [f"{at.data}:5", "--max_seq_len 256", "--on_long truncate or drop"]


def unknown_flag(at: Place) -> list[str]:
    at.flags["lora_rnak"] = 8
    return ["unknown flag --lora_rnak", "did you mean --lora_rank?"]


def wrong_type(at: Place) -> list[str]:
    at.variables["batch_size"] = "four"
    return ["--batch_size four", "not a whole number"]


def run_that_nobody_asked_to_continue(at: Place) -> list[str]:
    return [f"--output_dir {at.run}", "already holds a run", "--resume auto", "--overwrite_output_dir"]


def damaged_checkpoint_named(at: Place) -> list[str]:
    file = at.step / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # one bit
    file.write_bytes(content)
    at.flags["resume"] = at.step
    return [f"--resume {at.step}", str(file), "is damaged", "--resume auto"]


def other_data_on_resume(at: Place) -> list[str]:
    lines = at.data.read_text().splitlines()
    lines[3] = lines[3].replace("It is", "It was")
    at.data.write_text("\n".join(lines) + "\n")
    return ["--resume", str(at.step), "the training data", "changed", "another --output_dir"]


def no_such_pretrained_path(at: Place) -> list[str]:
    at.variables["pretrained_path"] = at.root / "nowhere"
    return [f"--pretrained_path {at.root / 'nowhere'}", "no such directory", "give the one with the weight files"]


def no_pretrained_path(at: Place) -> list[str]:
    at.flags["pretrained_path"] = None
    return ["--pretrained_path is missing", "name a directory"]


def data_that_is_not_there(at: Place) -> list[str]:
    at.data.unlink()
    return [str(at.data.with_name("data.yaml")), "META entry 1", "no such file", "correct the path"]


CASES: list[Callable[[Place], list[str]]] = [
    missing_last_shard, extra_shard, truncated_shard, shard_of_noise, flipped_bytes_in_the_zip_directory, wrong_shape,
    tokenizer_of_another_model, empty_data, too_long_example, unknown_flag, wrong_type, run_that_nobody_asked_to_continue,
    damaged_checkpoint_named, other_data_on_resume, no_such_pretrained_path, no_pretrained_path, data_that_is_not_there,
]  # fmt: skip
OF_TWO_RANKS = [
    missing_first_shard,
    pickle_with_code,
    model_parallel_that_n_heads_forbids,
    world_that_is_no_multiple,
    malformed_line,
]
FULL = {"missing_first_shard", "pickle_with_code", "world_that_is_no_multiple", "malformed_line"}  # exps/finetune_7b.sh
WITHOUT_SCRIPT = {"run_that_nobody_asked_to_continue", "no_pretrained_path"}


# --- how they run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Checkpoint, data and a run of BASE_STEPS steps."""
    root = tmp_path_factory.mktemp("base") / "files"
    at = Place(root)
    write_tiny_checkpoint(at.checkpoint, shards=2)
    write_tiny_data(at.data.parent)
    command, variables = at.command("", 1)
    done = Launch(command, root.with_name("log"), **variables | {"max_steps": BASE_STEPS}).wait()
    assert done.code == 0 and (at.run / "latest").resolve() == at.step, done.output
    return root


@dataclass
class Outcome:
    done: Done
    words: list[str]
    left: list[str]  # processes that outlived the launcher by more than a moment
    changed: set[str]
    root: Path


def play(case: Callable, base: Path, directory: Path, ranks: int) -> Outcome:
    at = Place(directory / "files")
    shutil.copytree(base, at.root, symlinks=True)
    words = case(at)
    before = hashes(at.root)
    command, variables = at.command(case.__name__, ranks)
    launch = Launch(command, directory / "log", **variables)
    done = launch.wait()
    left = outlive(launch)
    after = hashes(at.root)
    return Outcome(
        done, words, left, {f for f in before.keys() | after.keys() if before.get(f) != after.get(f)}, directory
    )


def outlive(launch: Launch) -> list[str]:
    """Processes of a launch that are still there GONE_WITHIN seconds after its end; they are killed."""
    deadline = time.monotonic() + GONE_WITHIN
    while launch.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [" ".join(p.cmdline()[:4]) for p in launch.alive()]
    launch.kill()
    return left


@pytest.fixture(scope="module")
def in_background(base, tmp_path_factory, request):
    """{case: its outcome, under way}, for those cases of one rank that this session is going to ask for."""
    names = {
        item.callspec.params["case"].__name__
        for item in request.session.items
        if "in_background" in getattr(item, "fixturenames", ())
    }
    pool = ThreadPoolExecutor(2)
    yield {
        c: pool.submit(play, c, base, tmp_path_factory.mktemp(c.__name__[:20]), 1) for c in CASES if c.__name__ in names
    }
    pool.shutdown(cancel_futures=True)


def one_line_once_and_last(done: Done, words: list[str]) -> None:
    assert done.code not in (0, -9), done.output
    assert "Traceback" not in done.output, done.output
    last = done.output.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: "), done.output[-2000:]
    for word in words:
        assert word in last, f"{word!r} is not in: {last}"
    assert re.search(r": \S.*", last.removeprefix("error: ")), f"no remedy after a colon: {last}"
    assert done.output.count(last.removeprefix("error: ")) == 1, done.output
    assert sum(line.startswith("error: ") for line in done.lines) == 1, done.output


def check(outcome: Outcome) -> None:
    assert not (outcome.root / "canary").exists(), "code in the file ran"
    one_line_once_and_last(outcome.done, outcome.words)
    assert not outcome.left
    assert outcome.done.since_error is None or outcome.done.since_error < GONE_WITHIN
    assert not outcome.changed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_rank(case, in_background: dict[Callable, Future]):
    check(in_background[case].result())


@pytest.mark.parametrize("case", OF_TWO_RANKS, ids=lambda case: case.__name__)
def test_two_ranks(case, base, tmp_path):
    check(play(case, base, tmp_path, ranks=2))


# --- a disk that fills ------------------------------------------------------------------------------------------------


def whole_and_loadable(steps: list[Path]) -> None:
    for step in steps:
        assert resume.problem(step, hashes=True) is None
        source = open_adapter(step)[1] if (step / "adapter.json").exists() else open_checkpoint(step).source
        assert all(source.read(name).isfinite().all() for name in source.names())


def test_a_file_that_cannot_be_written_on_one_rank(base, tmp_path):
    """RLIMIT_FSIZE below the size of adapter.safetensors, which rank 0 alone writes: both ranks end, nothing is lost."""
    at = Place(tmp_path / "files", {"report_to": "none"}, {"PYTHONDONTWRITEBYTECODE": 1})
    shutil.copytree(base, at.root, symlinks=True)
    before = hashes(at.root)
    limit = (at.step / "adapter.safetensors").stat().st_size // 1024 - 1
    command, variables = at.command("a_file_that_cannot_be_written", 2)
    launch = Launch(["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command], tmp_path / "log", **variables)
    done = launch.wait()
    assert not outlive(launch)
    next_step = at.run / f"step_{BASE_STEPS + 2:08d}"
    one_line_once_and_last(
        done,
        [
            f"--output_dir: saving {next_step} failed",
            "File too large",
            "earlier checkpoints are untouched",
            "same command",
        ],
    )
    assert done.since_error is not None and done.since_error < GONE_WITHIN
    check_only_metrics_grew(at, before)


def check_only_metrics_grew(at: Place, before: dict[str, str]) -> None:
    after = hashes(at.root)
    changed = {f for f in before.keys() | after.keys() if before.get(f) != after.get(f)}
    assert changed <= {"run/metrics.jsonl", "run/config.json"}, changed  # no step_*.tmp-*, no .trash-*
    assert [json.loads(line)["step"] for line in (at.run / "metrics.jsonl").read_text().splitlines()][
        : BASE_STEPS + 1
    ] == list(range(BASE_STEPS + 1))
    assert len(resume.steps(at.run)) == 2
    whole_and_loadable([path for _, path in resume.steps(at.run)])


@pytest.fixture
def small_disk(tmp_path):
    """mount(kilobytes) -> a directory on a disk of that size; again: the same disk at another size. Needs root."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = []

    def mount(kilobytes: int) -> Path:
        again = ",remount" if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k{again}", "tmpfs", str(directory)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not permitted here")
        mounted.append(directory)
        return directory

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_disk_that_is_full_at_the_second_save(small_disk, tmp_path):
    """Full tuning on two ranks: the first checkpoint fits, the second does not. With more room the same command goes on."""
    at = Place(tmp_path / "files")
    write_tiny_checkpoint(at.checkpoint)
    write_tiny_data(at.data.parent)
    weights = (at.checkpoint / "consolidated.00.pth").stat().st_size
    one = (
        4 * weights + (at.checkpoint / "tokenizer.model").stat().st_size
    ) // 1024 + 20  # weights, and resume/ of three times as much
    disk = small_disk(one + one * 19 // 20)
    command, variables = at.command("missing_first_shard", 2)
    variables |= {"output_dir": disk / "run", "max_steps": 4}
    launch = Launch(command, tmp_path / "log", **variables)
    done = launch.wait()
    assert not outlive(launch)
    first, second = (disk / "run" / f"step_{n:08d}" for n in (2, 4))
    one_line_once_and_last(
        done,
        [f"--output_dir: saving {second} failed", "No space left", "earlier checkpoints are untouched", "same command"],
    )
    assert done.since_error is not None and done.since_error < GONE_WITHIN
    assert sorted(p.name for p in (disk / "run").glob("*step_*")) == [first.name]
    assert not list((disk / "run").glob(".trash-*")) and (disk / "run" / "latest").resolve() == first
    whole_and_loadable([first])

    small_disk(4 * one)
    done = Launch(command, tmp_path / "log2", **variables).wait()
    assert done.code == 0 and f"continuing from {first}" in done.output, done.output
    whole_and_loadable([first, second])
    steps = [
        json.loads(line)["step"]
        for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]
    assert steps == [1, 2, 3, 4]
