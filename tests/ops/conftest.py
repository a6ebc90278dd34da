from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyengine import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU can run, chosen for the length of one test."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("auto")
