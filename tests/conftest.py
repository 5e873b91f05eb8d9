"""One thread a process, no telemetry, and the same hypotheses on every machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from sottovoce.server.cli import ENVIRONMENT

# Before any test imports torch or flwr.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("HYDRA_FULL_ERROR", None)

settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(params=["generic", "avx2", "avx512"])
def kernel_level(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The library of kernels in C, at each level that this processor has."""
    from sottovoce.client import native

    library = native.kernels()
    if library is None:
        pytest.skip("the kernels were not built: no C compiler at installation")
    before, wanted = library.kernels_level(), native.LEVELS.index(request.param)
    if library.kernels_use(wanted) != wanted:
        library.kernels_use(before)
        pytest.skip(f"this processor has no {request.param}")
    yield library
    library.kernels_use(before)
