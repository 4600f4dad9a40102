"""pytest-benchmark over `cases`: `python -m benchmarks.kernels` runs it and compares it with the last committed run."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.kernels.cases import Case, Setting, makers
from qvl_kernels import ops_for
from qvl_runtime.profile.run_info import finish

SCALE = int(os.environ.get("QVL_BENCH_SCALE", "1"))


@lru_cache(maxsize=1)  # ours and torch's one after the other, then the memory is freed
def setting_and_case(name: str) -> tuple[Setting, Case]:
    """The setting and the case of this name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at = Setting(ops_for(device), device, torch.bfloat16, SCALE)
    return at, makers()[name](at)


@pytest.mark.parametrize("way", ["ours", "torch"])
@pytest.mark.parametrize("name", makers())
def test_op(benchmark: Any, name: str, way: str) -> None:
    """Time one case, ours or torch's, and record GB/s and Gop/s."""
    at, case = setting_and_case(name)
    call = case.ours if way == "ours" else case.torch
    if call is None:
        pytest.skip("torch has no such op")

    def run() -> None:
        call()
        finish(at.device)

    benchmark.group = name
    with torch.inference_mode():
        benchmark(run)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {"gb_s": case.nbytes / seconds / 1e9, "gop_s": case.operations / seconds / 1e9}
