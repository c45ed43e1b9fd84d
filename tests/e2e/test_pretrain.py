"""Pre-training from random weights and going on with an adapter, by the command line; and what is refused.

random weights, mp 2    ------ step 2 ------> step 4
the same, one rank      --------------------> step 4      the same losses
mp 2's step 2, one rank        `------------> step 4      the same losses
base -> LoRA run -> its adapter, and PEFT's copy of it, as --lora_path: the loss before step 1 is the adapter's
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accessory import config, main_pretrain
from accessory.data.blocks import PretrainDataArgs
from accessory.data.corpus import CorpusArgs, build
from accessory.flags import ParallelArgs
from accessory.model.lora import TuningArgs
from accessory.train import loop, optim
from accessory.train.start import RunArgs
from tests.e2e.launches import Launch, as_flags, launch_line
from tests.helpers import ROOT, write_tiny_checkpoint, write_tiny_data

SECTIONS = (RunArgs, ParallelArgs, TuningArgs, PretrainDataArgs, optim.OptimArgs, loop.LoopArgs)
COMMON = {"precision": "fp32", "batch_size": 2, "lr": 1e-2, "warmup_steps": 0, "report_to": "none", "seed": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """tiny/ (weights and tokenizer), data/, corpus/ (a store of its answers), sizes.json."""
    root = tmp_path_factory.mktemp("pretrain")
    write_tiny_checkpoint(root / "tiny")
    write_tiny_data(root / "data")
    build(CorpusArgs([str(root / "data" / "train.jsonl")], str(root / "corpus"), str(root / "tiny"), 1, field="output"))
    sizes = json.loads((root / "tiny" / "params.json").read_text()) | {"vocab_size": -1}
    (root / "sizes.json").write_text(json.dumps(sizes))
    return root


def scratch(place: Path, output: str, **more: object) -> list[str]:
    given = {"llama_config": place / "sizes.json", "tokenizer_path": place / "tiny", "corpus": place / "corpus"}
    given |= {"block_size": 16, "output_dir": place / output, "max_steps": 4, "save_steps": 2, "eval_steps": 2}
    return as_flags(given | {"val_ratio": 0.2, "global_batch_size": 4} | COMMON | more)


def finished(command: list[str], log: Path) -> None:
    done = Launch(command, log).wait()
    assert done.code == 0, done.output


def metrics(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def test_from_random_weights_on_any_layout(place):
    def run(output: str, ranks: int, *more: str, **flags: object) -> None:
        line = launch_line(*scratch(place, output, **flags), *more, ranks=ranks)
        line[line.index("accessory.main_finetune")] = "accessory.main_pretrain"
        finished(line, place / f"{output}-{ranks}.log")

    run("two", 2, model_parallel_size=2)
    run("one", 1)
    shutil.copytree(place / "two", place / "moved", symlinks=True)
    shutil.rmtree(place / "moved" / "step_00000004")
    run("moved", 1, resume="auto")
    for key in ("loss", "val_loss"):
        expected = metrics(place / "one", key)
        assert len(expected) == {"loss": 4, "val_loss": 3}[key] and expected[0 if key == "val_loss" else 1] > 5
        for other in ("two", "moved"):
            found = metrics(place / other, key)
            assert found.keys() == expected.keys()
            assert all(abs(found[s] - expected[s]) <= 1e-5 * expected[s] for s in expected), (key, other)
    assert metrics(place / "one", "loss")[4] < metrics(place / "one", "loss")[1]


def test_an_adapter_goes_on_from_its_own_loss(place):
    flags = as_flags(
        {"pretrained_path": place / "tiny", "data_config": place / "data" / "data.yaml", "max_steps": 2} | COMMON
    )
    main = [sys.executable, "-m", "accessory.main_finetune", *flags]
    finished([*main, "--lora_rank", "4", "--output_dir", str(place / "first")], place / "first.log")
    tool = [sys.executable, "tools/lora_to_peft.py", "--src", str(place / "first" / "latest")]
    subprocess.run([*tool, "--dst", str(place / "peft")], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT)})
    own = metrics(place / "first", "val_loss")
    assert own[2] < own[0]
    for adapter, output in (("first/latest", "second"), ("peft", "third")):
        finished([*main, "--lora_path", str(place / adapter), "--output_dir", str(place / output)], place / "more.log")
        found = metrics(place / output, "val_loss")
        assert found[0] == own[2] and found[2] < found[0]
        base = json.loads((place / output / "latest" / "adapter.json").read_text())["base"]["path"]
        assert base == str(place / "tiny")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"corpus": ""}, ["--corpus is missing", "build_corpus.py"]),
        ({"corpus": "nowhere"}, ["nowhere", "no "]),
        ({"tokenizer_path": ""}, ["--tokenizer_path is missing"]),
        ({"llama_config": ""}, ["--pretrained_path is missing"]),
        ({"lora_rank": 4}, ["--pretrained_path is missing", "adapter"]),
        ({"block_size": 1}, ["--block_size 1"]),
    ],
)
def test_refusals(place, flags, words):
    with pytest.raises(ValueError) as error:
        main_pretrain.main(*config.parse(scratch(place, "refused", **flags), *SECTIONS))
    assert all(word in str(error.value) for word in words), error.value
    assert not (place / "refused").exists()


def test_a_corpus_of_another_tokenizer_is_refused(place, tmp_path):
    build(
        CorpusArgs([str(place / "data" / "train.jsonl")], str(tmp_path / "c"), str(place / "tiny"), 1, field="output")
    )
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    meta["tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="tokenizer"):
        main_pretrain.main(*config.parse(scratch(place, "refused", corpus=tmp_path / "c"), *SECTIONS))
