"""Flags: what is read, what is refused and in which words. How a failed run ends, alone; under accessory.launch: test_launch.py."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from accessory import config
from accessory.config import flag
from tests.helpers import ROOT


@dataclass
class Shape:
    """The shape of it"""

    width: int = flag(4, "how wide")
    lr: float = flag(1e-3, "how fast")
    mode: str = flag("fsdp", "which of them", choices=("fsdp", "ddp"))
    norm_tuning: bool = flag(False, "a switch whose name begins with no")
    checkpointing: bool = flag(True, "a switch")

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"--width {self.width}: expected 1 or more")


@dataclass
class Files:
    """Where things are"""

    path: str = flag("", "a path")
    maybe: str | None = flag(None, "a word, or none")
    count: int | None = flag(None, "a number, or none")
    keep: bool | None = flag(None, "a switch, or none")
    targets: list[str] = flag(("wq", "wv"), "some of them", choices=("wq", "wk", "wv"))
    betas: list[float] = flag([0.9, 0.95], "two numbers")
    patterns: list[str] = flag([], "globs")


def read(*argv: str) -> dict:
    shape, files = config.parse(list(argv), Shape, Files)
    return vars(shape) | vars(files)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (
            [],
            {"width": 4, "lr": 1e-3, "mode": "fsdp", "path": "", "maybe": None, "targets": ["wq", "wv"], "keep": None},
        ),
        (["--width", "7", "--lr=2e-5"], {"width": 7, "lr": 2e-5}),
        (["--lr", "-1e-5"], {"lr": -1e-5}),  # a dash before a digit is a value
        (["--path=-x", "--maybe=--no"], {"path": "-x", "maybe": "--no"}),
        (["--path", "-"], {"path": "-"}),
        (["--path", "a b=c"], {"path": "a b=c"}),
        (["--path", "007"], {"path": "007"}),  # nothing is retyped
        (["--path", "1,2", "--maybe", "[1, 2]"], {"path": "1,2", "maybe": "[1, 2]"}),
        (["--path", "True"], {"path": "True"}),
        (["--path", "Größe/模型"], {"path": "Größe/模型"}),
        (["--width", "1", "--width", "2"], {"width": 2}),  # the last of a repeated flag: "$@" comes last in the scripts
        (["--norm_tuning"], {"norm_tuning": True}),
        (["--norm_tuning", "--width", "2"], {"norm_tuning": True, "width": 2}),
        (["--keep"], {"keep": True}),
        (["--checkpointing", "false", "--norm_tuning", "Yes"], {"checkpointing": False, "norm_tuning": True}),
        (["--norm-tuning", "1"], {"norm_tuning": True}),
        (["--maybe", "none", "--count", "None", "--keep", ""], {"maybe": None, "count": None, "keep": None}),
        (["--count", "3", "--keep", "off"], {"count": 3, "keep": False}),
        (["--targets", "wk"], {"targets": ["wk"]}),
        (["--targets", "wk, wq,"], {"targets": ["wk", "wq"]}),
        (["--targets", ""], {"targets": []}),
        (["--betas", "0.5,1"], {"betas": [0.5, 1.0]}),
        (["--patterns", "!layers.0,layers.*.wq.weight"], {"patterns": ["!layers.0", "layers.*.wq.weight"]}),
    ],
    ids=str,
)
def test_what_is_read(argv: list[str], expected: dict) -> None:
    got = read(*argv)
    assert {k: got[k] for k in expected} == expected
    assert all(type(got[k]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--widht", "3"], "unknown flag --widht: did you mean --width?"),
        (["--target", "wq"], "unknown flag --target: did you mean --targets?"),
        (["--zzzzzz", "3"], "unknown flag --zzzzzz: --help lists them all"),
        (["--nocheckpointing"], "unknown flag --nocheckpointing: did you mean --checkpointing?"),
        (["--width", "3.5"], "--width 3.5: not a whole number"),
        (["--width", "three"], "--width three: not a whole number"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--lr", "nan"], "--lr nan: not a number"),
        (["--norm_tuning", "maybe"], "--norm_tuning maybe: not true or false"),
        (["--count", "x"], "--count x: not a whole number"),
        (["--width", "none"], "--width none: not a whole number"),
        (["--betas", "0.9,x"], "--betas x: not a number"),
        (["--mode", "zero3"], "--mode zero3: choose one of fsdp, ddp"),
        (["--targets", "wq,wx"], "--targets wx: choose one of wq, wk, wv"),
        (["--width", "0"], "--width 0: expected 1 or more"),
        (["--path"], "--path has no value"),
        (
            ["--path", "--width", "3"],
            "--path has no value: write --path value, or --path=value where the value starts with a dash",
        ),
        (["--patterns", "-x"], "--patterns has no value"),
        (["run"], "'run' is not a flag"),
        (["--width", "3", "4"], "'4' is not a flag"),
        (["--width", "3", "--", "--trace"], "'--' is not a flag"),
    ],
    ids=str,
)
def test_what_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(*argv)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        read("--width", "x", "--help")
    assert end.value.code in (0, None)
    text = capsys.readouterr().out
    for line in (
        *(
            "The shape of it",
            "Where things are",
            "--width  (default: 4)",
            "--lr  (default: 0.001)",
            "--mode {fsdp,ddp}  (default: fsdp)",
        ),
        *(
            "--path  (default: none)",
            "--maybe  (default: none)",
            "--targets {wq,wk,wv}  (default: wq,wv)",
            "--betas  (default: 0.9,0.95)",
        ),
        *("a switch whose name begins with no", "--norm_tuning  (default: False)", "--patterns  (default: none)"),
    ):
        assert line in text, line


FLAGS = """--llama_config --tokenizer_path --pretrained_path --pretrained_type --lora_path --data_config --val_ratio --model_parallel_size --data_parallel
--cpu_offload --precision --batch_size --eval_batch_size --accum_iter --global_batch_size --epochs --max_steps --max_seq_len --on_long --template --template_date --train_on --tokenize --packing --preview --lr --min_lr --lr_scheduler
--warmup_ratio --warmup_steps --weight_decay --adam_betas --adam_eps --clip_grad --optim_states --sequence_parallel --checkpointing --compile --quant --calibration_tokens --lora_rank --lora_alpha
--lora_dropout --lora_targets --modules_to_save --use_rslora --rank_pattern --alpha_pattern --bias_tuning --norm_tuning --trainable --output_dir --overwrite_output_dir --save_steps
--save_total_limit --keep_best --keep_best_n --metric --early_stop_patience --stop_perplexity --eval_steps --logging_steps --sample_prompts --sample_steps --as_test --resume --seed --share_prompts --profile_steps --num_workers --report_to
--only_save_trainable --embedding_dim --dry_run""".split()


def test_the_flags_of_fine_tuning_are_all_there() -> None:
    """Their names are fixed: people's scripts hold them."""
    from accessory import main_finetune as m

    sections = [m.RunArgs, m.ParallelArgs, m.TuningArgs, m.DataArgs, m.OptimArgs, m.LoopArgs]
    text = config.help_text(sections, "")
    listed = dict(re.findall(r"^  (--\w+).*\n +(\S.*)$", text, re.M))
    assert sorted(listed) == sorted(FLAGS) and all(len(meaning) > 10 for meaning in listed.values())


@pytest.mark.parametrize("program", ["finetune", "pretrain", "generate"])
def test_help_and_a_wrong_flag_do_not_wait_for_torch(tmp_path: Path, program: str) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was wanted')\n")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for argv, code, said in (
        ("--help", 0, "--pretrained_path"),
        ("--pretrained_pth", 1, "did you mean --pretrained_path?"),
    ):
        command = [sys.executable, "-m", f"accessory.main_{program}", argv, "x"]
        done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_given_flags_are_known() -> None:
    shape, files = config.parse(["--width", "4", "--maybe", "none"], Shape, Files)
    assert shape.given == files.given == {"width", "maybe"}


# --- ends of a process ------------------------------------------------------------------------------------------------


def python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


MAIN = """
    import dataclasses
    from accessory import config
    @dataclasses.dataclass
    class Args:
        kind: str = config.flag("", "how it ends")
    def main(args):
        print("at work")
        if args.kind == "missing":
            open("/no/such/file")
        if args.kind == "wrong":
            raise ValueError("--kind wrong: choose better")
        if args.kind == "bug":
            raise KeyError("ours")
    config.run(main, Args)
"""


def test_a_users_error_is_one_line_and_ours_a_traceback(tmp_path: Path) -> None:
    ends = {
        "": (0, r""),
        "wrong": (1, r"error: --kind wrong: choose better\n"),
        "missing": (1, r"error: /no/such/file: No such file or directory\n"),
        "bug": (1, r"Traceback (.|\n)*KeyError: 'ours'\n"),
    }
    for kind, (code, stderr) in ends.items():
        done = python(MAIN, f"--kind={kind}")
        assert done.returncode == code and re.fullmatch(stderr, done.stderr), done.stderr
        assert done.stdout == "at work\n"
    done = python(MAIN, "--knid", "x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: unknown flag --knid: did you mean --kind?\n")
    assert "torch" not in python("import sys, accessory.config, accessory.log; print(sorted(sys.modules))").stdout


STEP = """
    import sys, torch
    from accessory.model import Transformer
    from accessory.model.args import ModelArgs
    from accessory.train.optim import OptimArgs, adamw
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=64)).init_weights()
    tokens = torch.arange(12)[None]
    for states in ("fp32", "bf16"):
        optimizer = adamw(model, OptimArgs(optim_states=states))
        model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 5, 12]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(sorted({"torch._dynamo", "torch.distributed.fsdp"} & set(sys.modules)))
"""


def test_a_step_that_is_not_compiled_does_without_the_compiler() -> None:
    """Two of five seconds of a start: torch imports it for the decorators of its optimizers."""
    done = python(STEP)
    assert done.stdout == "[]\n", done.stderr


def test_under_the_launcher_the_line_goes_into_its_file(tmp_path: Path) -> None:
    done = python(MAIN, "--kind", "wrong", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert (done.returncode, done.stderr) == (1, "")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (
        message["message"] == "error: --kind wrong: choose better"
        and abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 60
    )


TOOL = """
    from accessory.config import run_tool
    def main(*, src: str, size: int = 3, dtype: str | None = None, flat: bool = False) -> None:
        '''Turns src.'''
        print([src, size, dtype, flat])
    run_tool(main)
"""


@pytest.mark.parametrize(
    "argv, code, out",
    [
        (["--src", "1e3", "--size", "4", "--flat"], 0, "['1e3', 4, None, True]\n"),
        (["--src", "a", "--dtype", "none", "--flat", "0"], 0, "['a', 3, None, False]\n"),
        (["--size", "4"], 1, "error: --src is missing: --help shows what this tool takes\n"),
        (["--src", "a", "--sise", "4"], 1, "error: unknown flag --sise: did you mean --size?\n"),
        (["--src", "a", "--size", "big"], 1, "error: --size big: not a whole number\n"),
        (
            ["--src"],
            1,
            "error: --src has no value: write --src value, or --src=value where the value starts with a dash\n",
        ),
    ],
    ids=str,
)
def test_tools(argv: list[str], code: int, out: str) -> None:
    done = python(TOOL, *argv)
    assert (done.returncode, done.stdout + done.stderr) == (code, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_falls_into_a_callback_stops_a_tool_all_the_same(number: signal.Signals) -> None:
    """Python drops what a weak reference's callback raises, and the import system has one for every module it loads."""
    done = python(
        f"""
        import signal, time, weakref
        from accessory.config import run_tool
        class Dropped: pass
        def main() -> None:
            dropped = Dropped()
            reference = weakref.ref(dropped, lambda _: signal.raise_signal({int(number)}))
            del dropped
            time.sleep(60)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_tool(main)
        """
    )
    assert (done.returncode, done.stdout + done.stderr) == (128 + number, "")


def test_a_tools_help() -> None:
    done = python(TOOL, "--help")
    assert (
        done.returncode == 0
        and "--src STR [--size 3] [--dtype None] [--flat False]" in done.stdout
        and "Turns src." in done.stdout
    )
