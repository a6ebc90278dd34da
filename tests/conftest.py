"""Fixtures that several files share: the bundled engine, with plans kept for the whole run in a folder of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folder import made_once, new_run_folder

import pyengine

# `training` is no part of the wheel. Last, so that the installed pyengine comes before the source tree's.
sys.path.append(str(Path(__file__).parents[1]))


_run_folder = new_run_folder()
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core: PyTorch's threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure() -> None:
    """Removes what the workers shared, once they are done."""
    if _run_folder is not None:
        _run_folder.cleanup()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: for tensors so small, threads that wait for each other cost more than they save."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plan_cache() -> Path:
    """Where this run keeps its plans, for all its workers."""
    return made_once("plans", lambda folder: None)


@pytest.fixture(scope="session")
def engine(plan_cache: Path) -> Iterator[pyengine.Engine]:
    """The bundled model, with our kernels cut in so that every test exercises them."""
    loaded = pyengine.load("shapes", cache_dir=plan_cache, choice="cut")
    yield loaded
    loaded.close()
