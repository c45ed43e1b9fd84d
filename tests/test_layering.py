"""The import table of docs/architecture.md, held against every import statement, also those inside functions; and a few
habits that must not creep in (unsafe loads, shells, work at import). Pure syntax trees: `pytest tests/test_layering.py`."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ALL = {
    "flags",
    "config",
    "log",
    "tokenizer",
    "parallel",
    "model",
    "weights",
    "data",
    "checkpoint",
    "train",
    "generation",
}
MAY_IMPORT = {  # package or module of accessory -> what of accessory it may import; itself always
    "__init__": set(),
    "config": set(),
    "log": set(),
    "launch": {"nodes"},
    "nodes": set(),
    "plot": set(),
    "sentencepiece_proto": set(),
    "tokenizer_files": set(),
    "tokenizer": {"tokenizer_files", "config", "log"},
    "flags": {"config", "log"},
    "parallel": {"flags", "config", "log"},
    "model": {"parallel", "flags", "config"},
    "weights": {"model", "config", "sentencepiece_proto"},
    "data": {"tokenizer", "config", "log", "sentencepiece_proto"},
    "checkpoint": {"parallel", "model", "weights", "config", "log"},
    "train": {"parallel", "model", "checkpoint", "data", "tokenizer", "flags", "config", "log"},
    "generation": {"model", "parallel", "tokenizer", "checkpoint", "data", "config", "log"},
    "main_finetune": ALL,
    "main_generate": ALL,
    "main_pretrain": ALL,
}
EXCEPTIONS = {("accessory/model/pretrained.py", "checkpoint")}  # inside from_pretrained's function only
COLLECTIVES = {  # the only files outside accessory/parallel/ that import torch.distributed, and what of it
    "accessory/launch.py": ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.DistError"),
}
PEERS = {"transformers", "peft", "deepspeed", "accelerate", "torchtune", "litgpt"}  # never at run time


class Import(NamedTuple):
    file: str  # relative to the repository
    line: int
    module: str  # absolute: accessory.model.llama, torch.distributed
    at_top: bool  # outside every function


def files() -> list[Path]:
    return sorted([*(ROOT / "accessory").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in files():
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def imports(file: str, tree: ast.Module) -> Iterator[Import]:
    """Every import statement of one file; `from a import b` counts as a.b, so that a submodule is never overlooked."""
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(file, node.lineno, name, id(node) not in inner) for name in names)


ALL_IMPORTS = [i for file, tree in trees() for i in imports(file, tree)]
OURS = [i for i in ALL_IMPORTS if i.file.startswith("accessory/")]


def unit_of(file: str) -> str:
    """accessory/model/llama.py -> model, accessory/config.py -> config"""
    return file.split("/")[1].removesuffix(".py")


def is_of(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def shown(bad: list[Import]) -> str:
    return "".join(f"\n  {i.file}:{i.line} imports {i.module}" for i in bad)


def test_every_unit_is_in_the_table():
    units = {unit_of(str(p.relative_to(ROOT))) for p in (ROOT / "accessory").rglob("*.py")}
    assert units == set(MAY_IMPORT), "the table here and in docs/architecture.md must tell the truth"


def test_import_table():
    bad = []
    for i in OURS:
        if not is_of(i.module, "accessory") or i.module == "accessory":
            continue
        target, unit = i.module.split(".")[1], unit_of(i.file)
        if target not in MAY_IMPORT[unit] | {unit} and (i.at_top or (i.file, target) not in EXCEPTIONS):
            bad.append(i)
    assert not bad, shown(bad)


def test_nothing_imports_a_main():
    bad = [
        i
        for i in ALL_IMPORTS
        if is_of(i.module, "accessory") and i.module.split(".")[1:2] and i.module.split(".")[1].startswith("main_")
    ]
    assert not bad, shown(bad)


def test_collectives_and_fairscale_only_in_parallel():
    def allowed(i: Import) -> bool:
        if i.file.startswith("accessory/parallel/") or not is_of(i.module, "torch.distributed", "fairscale"):
            return True
        return is_of(i.module, *COLLECTIVES.get(i.file, ()))

    bad = [i for i in ALL_IMPORTS if not allowed(i)]
    assert not bad, shown(bad)


def test_no_peer_at_run_time():
    bad = [i for i in ALL_IMPORTS if is_of(i.module, *PEERS)]
    assert not bad, shown(bad)


def test_what_a_start_needs_first_imports_without_torch():
    bad = [
        i
        for i in OURS
        if unit_of(i.file) in ("config", "log", "flags", "launch", "nodes", "plot", "__init__")
        and i.at_top
        and is_of(i.module, "torch")
    ]
    assert not bad, shown(bad)


def test_the_table_has_no_cycle():
    """Not over any number of steps; the exception aside."""
    seen = {unit: set(targets) for unit, targets in MAY_IMPORT.items()}
    for _ in seen:
        for unit in seen:
            seen[unit] |= {far for near in seen[unit] for far in seen.get(near, ())}
    assert not [unit for unit in seen if unit in seen[unit]]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_loads_are_safe():
    """torch.load only with weights_only=True, no pickle.load, no shell=True, no eval or exec."""
    bad = []
    for file, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name, words = called(node), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                (name == "torch.load" and words.get("weights_only") != "True")
                or name in ("pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load")
                or words.get("shell") == "True"
            ):
                bad.append(f"{file}:{node.lineno} {name}")
    assert not bad, bad


def test_one_backward():
    """The loop has the only backward()."""
    found = [
        f"{file}:{n.lineno}"
        for file, tree in trees()
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and called(n).endswith(".backward")
    ]
    found = [place for place in found if "/parallel/" not in place]  # autograd functions define theirs
    assert len(found) == 1 and found[0].startswith("accessory/train/loop.py:"), found


@pytest.mark.parametrize("tool", sorted(p.name for p in (ROOT / "tools").glob("*.py")))
def test_tools_are_thin(tool):
    assert len((ROOT / "tools" / tool).read_text().splitlines()) <= 70


def test_importing_the_model_has_no_side_effects():
    """In a process of its own: no group, no logging, no default dtype, no CUDA context, no threads changed."""
    code = """
import logging, os, random
import numpy, torch, torch.distributed as dist
state = lambda: (logging.root.handlers[:], logging.root.level, torch.get_default_dtype(), torch.get_num_threads(), dist.is_initialized(),
                 torch.cuda.is_initialized(), torch.get_rng_state().sum().item(), random.getstate()[1][:3], dict(os.environ), torch.is_grad_enabled(),
                 torch.get_float32_matmul_precision())
before = state()
import accessory.model
from accessory.model import Transformer
assert state() == before, (state(), before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", done.stdout


def test_every_test_is_found(pytestconfig):
    """pytest's own list of directories that it passes over has `dist` in it."""
    names = {part for f in (ROOT / "tests").rglob("test_*.py") for part in f.relative_to(ROOT).parts[:-1]}
    passed_over = [n for n in names if any(fnmatch.fnmatch(n, p) for p in pytestconfig.getini("norecursedirs"))]
    assert {"dist", "unit", "e2e", "gpu"} <= names and not passed_over
