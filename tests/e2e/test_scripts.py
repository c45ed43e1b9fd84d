"""Every script in exps/ as a user types it, with SMOKE=1, in a stand-in clone whose output/ is its own: it ends well, leaves
what it promises, and the same command again is quick and changes nothing. A script that comes later is tested by being there.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.checkpoint import resume
from accessory.checkpoint.formats import open_checkpoint
from tests.e2e.launches import Done, Launch, hashes
from tests.helpers import ROOT

SCRIPTS = sorted(p.name for p in (ROOT / "exps").glob("*.sh") if p.name != "setup_env.sh")
SMOKE_SECONDS = 20  # of work, on two cores
FLAGS = """llama_config tokenizer_path pretrained_path lora_path pretrained_type data_config val_ratio model_parallel_size data_parallel
cpu_offload precision batch_size eval_batch_size accum_iter epochs max_steps max_seq_len on_long lr min_lr lr_scheduler
warmup_ratio warmup_steps weight_decay adam_betas adam_eps clip_grad checkpointing compile lora_rank lora_alpha lora_dropout
lora_targets modules_to_save use_rslora rank_pattern alpha_pattern bias_tuning norm_tuning trainable output_dir overwrite_output_dir save_steps save_total_limit
keep_best keep_best_n metric early_stop_patience stop_perplexity eval_steps logging_steps sample_prompts sample_steps as_test resume seed num_workers report_to only_save_trainable embedding_dim
dry_run""".split()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository's scripts in a directory of their own; what they run is this repository's."""
    directory = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "exps", directory / "exps")
    for path in ROOT.iterdir():
        if path.name not in ("exps", "output", "build", "dist") and not path.name.startswith("."):
            (directory / path.name).symlink_to(path)
    return directory


def run(clone: Path, script: str, *flags: str, **variables: object) -> tuple[Done, float]:
    """-> how it ended, and the processor seconds that it and its children used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = clone / "logs" / f"{script}-{len(list((clone / 'logs').glob('*.log')))}.log"
    log.parent.mkdir(exist_ok=True)
    launch = Launch(["bash", f"exps/{script}", *flags], log, clone, **variables)
    done = launch.wait()
    assert not launch.alive()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_and_the_same_command_again(script, clone):
    done, seconds = run(clone, script, SMOKE=1)
    assert done.code == 0, done.output
    assert seconds < 2 * SMOKE_SECONDS, f"{seconds:.0f} processor seconds"
    runs = [p.parent for p in (clone / "output" / "smoke" / Path(script).stem).rglob("metrics.jsonl")]
    assert runs or not script.startswith(("finetune", "quickstart")), "no run was left"
    for directory in runs:
        newest = (directory / "latest").resolve()
        assert resume.problem(newest, hashes=True) is None
        number = int(newest.name.removeprefix("step_"))
        assert steps(directory) == list(range(1, number + 1))
        source = open_checkpoint(newest).source
        assert all(source.read(name).isfinite().all() for name in source.names())
        assert not list(directory.glob("step_*.tmp-*")) and not list(directory.glob(".trash-*"))

    before = hashes(clone / "output")
    # the processor seconds of a crowded machine swing by half; the least of three is the command's own
    for _ in range(3):
        again, quicker = run(clone, script, SMOKE=1)
        assert again.code == 0 and re.search("finished", again.output, re.I), again.output
        assert "step/s" not in again.output and "s/step" not in again.output, again.output  # it trained nothing
        assert hashes(clone / "output") == before
        if quicker < 1.2 * seconds:
            break
    assert quicker < 1.2 * seconds  # the tiny model trains in a second: starting up is most of either


def test_full_tuning_smokes_at_model_parallel_2(clone):
    run_directory = clone / "output" / "smoke" / "finetune_7b"
    if not run_directory.exists():
        run(clone, "finetune_7b.sh", SMOKE=1)
    assert json.loads((run_directory / "config.json").read_text())["ParallelArgs"]["model_parallel_size"] == 2
    assert json.loads((run_directory / "latest" / "manifest.json").read_text())["mp"] == 2
    assert sorted(p.name for p in (run_directory / "latest").glob("*.pth")) == [
        f"consolidated.0{i}-of-02.model.pth" for i in (0, 1)
    ]


def test_quick_start_leaves_one_model_in_three_formats(clone):
    work = clone / "output" / "smoke" / "quickstart"
    if not work.exists():
        run(clone, "quickstart.sh", SMOKE=1)
    assert (open_checkpoint(work / "run" / "latest").adapter or {})["lora_rank"] == 8
    merged, exported = open_checkpoint(work / "merged"), open_checkpoint(work / "hf")
    assert (merged.kind, merged.adapter, exported.kind) == ("meta_ori", None, "hf")
    assert set(merged.source.names()) == set(exported.source.names())
    assert all(merged.source.read(n).equal(exported.source.read(n)) for n in merged.source.names())
    base = open_checkpoint(clone / "output" / "smoke" / "tiny").source
    assert any(not merged.source.read(n).equal(base.read(n)) for n in base.names())
    answers = {p.name: p.read_text() for p in (work / "answers").iterdir() if p.suffix != ".log"}
    assert set(answers) == {"run", "merged", "hf"} and len(set(answers.values())) == 1
    assert "What colour is grass?" in (work / "run" / "samples.jsonl").read_text()


def test_more_steps_from_the_environment_continue_the_run(clone):
    variables = {"SMOKE": 1, "output_dir": clone / "elsewhere", "lora_rank": 2, "save_steps": 2}
    first, _ = run(clone, "finetune_lora_7b.sh", max_steps=2, **variables)
    assert first.code == 0 and steps(clone / "elsewhere") == [1, 2], first.output
    assert json.loads((clone / "elsewhere" / "latest" / "adapter.json").read_text())["lora_rank"] == 2
    more, _ = run(
        clone, "finetune_lora_7b.sh", "--max_steps", "3", max_steps=2, **variables
    )  # what follows the script wins
    assert more.code == 0 and "continuing from" in more.output, more.output
    assert steps(clone / "elsewhere") == [1, 2, 3]
    assert resume.problem(clone / "elsewhere" / "step_00000003", hashes=True) is None


def test_flags_after_the_script_reach_the_program(clone):
    done, _ = run(
        clone, "finetune_7b.sh", "--dry_run", "true", SMOKE=1, exp_name="planned", nproc_per_node=1, model_parallel=1
    )
    assert done.code == 0, done.output
    for word in (
        "parameters; trained: ",
        "(100.00%)",
        "memory per rank: about",
        "steps: 4 of 4 sequences",
        "an epoch is ",
    ):
        assert word in done.output, done.output
    assert not (clone / "output" / "planned").exists()


def test_a_failure_is_a_failure(clone):
    done, _ = run(clone, "finetune_lora_7b.sh", SMOKE=1, pretrained_path="/no/such/place", exp_name="failed")
    assert done.code != 0 and "/no/such/place" in done.last
    for script in SCRIPTS:
        assert re.search(r"^set -euo pipefail$", (ROOT / "exps" / script).read_text(), re.M), script


def test_help_lists_every_flag_with_its_meaning():
    done = subprocess.run(
        [sys.executable, "-m", "accessory.main_finetune", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == ""
    described = dict(re.findall(r"^  --(\w+)(?: \{[^}]*\})?  \(default: [^\n]+\)\n {8}(\S[^\n]*)", done.stdout, re.M))
    assert set(FLAGS) <= set(described), set(FLAGS) - set(described)
    assert "--data_parallel {fsdp,sdp,ddp}" in done.stdout and "--on_long {truncate,drop,error}" in done.stdout
    assert (
        "--pretrained_type {meta_ori,consolidated,hf,gguf}" in done.stdout
        and "--report_to {none,tensorboard,wandb}" in done.stdout
    )
