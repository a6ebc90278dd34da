"""Fixtures that several files share: the bundled engine, with plans kept for the whole run in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyengine

# `training` is no part of the wheel. Last, so that the installed pyengine comes before the source tree's.
sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: for tensors so small, threads that wait for each other cost more than they save."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plan_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run keeps its plans."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def engine(plan_cache: Path) -> Iterator[pyengine.Engine]:
    """The bundled model, with our kernels cut in so that every test exercises them."""
    loaded = pyengine.load("shapes", cache_dir=plan_cache, choice="cut")
    yield loaded
    loaded.close()
