"""Each instruction set that this machine runs, one after another, and tensors to try the kernels on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qvl_kernels.cpu import library as cpu_library

try:
    AVAILABLE: tuple[str, ...] = cpu_library.Library().available
except cpu_library.LibraryError:
    AVAILABLE = ()


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the kernels of one instruction set; skips where the build or the CPU lacks it."""
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} kernels here: the build and the CPU have {AVAILABLE or 'none'}")
    with cpu_library.instruction_set(request.param):
        yield request.param


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
