"""Fixtures for every test; the functions behind them are in tests/helpers.py."""

import gc

import pytest

from tests import helpers


def pytest_collection_finish():
    """What was imported by now stays; each collection of garbage would go through all of it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _pool_ends():
    """The workers of run_ranks, if any test started them, end with the session."""
    yield
    helpers.close_pool()


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """A tiny random checkpoint: consolidated.00.pth, params.json, tokenizer.model."""
    return helpers.write_tiny_checkpoint(tmp_path / "tiny")
