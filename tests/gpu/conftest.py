"""Every test of this directory needs a CUDA device; without one all are skipped with the same line."""

import gc
from pathlib import Path

import pytest
import torch

from accessory.parallel import groups
from tests.gpu import bodies


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_gpu():
    """A test begins in a world of one rank, made on the GPU, with an empty device and no compiled graphs."""
    if torch.cuda.is_available():
        groups.init(1, on="cuda")
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter) -> None:
    if bodies.FIGURES and torch.cuda.is_available():
        terminalreporter.section(f"measured on {torch.cuda.get_device_name()}, torch {torch.__version__}")
        for figure in bodies.FIGURES:
            terminalreporter.write_line(figure)
