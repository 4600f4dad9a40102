"""Fixtures: each instruction set that this machine supports, and a seeded generator."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from qvl_kernels.cpu import library as cpu_library

try:
    AVAILABLE: tuple[str, ...] = cpu_library.Library().available
except cpu_library.LibraryError:
    AVAILABLE = ()


ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
COMPILED = ["i8mm", "dotprod", "neon", "portable"] if ON_ARM else ["amx", "avx512", "avxvnni", "avx2", "portable"]


@pytest.fixture(params=COMPILED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the kernels of one instruction set; skip it if the build or the CPU lacks them."""
    if request.param not in AVAILABLE:
        pytest.skip(f"no {request.param} kernels here: the build and the CPU support {AVAILABLE or 'none'}")
    with cpu_library.instruction_set(request.param):
        yield request.param


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
