"""The device, software and date of a measurement, and the ceilings of the machine that it is compared with."""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qvl_runtime.host import device_name, total_memory
from qvl_runtime.profile.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 1 << 29  # more than any cache holds
GEMM = (1024, 4096, 4096)  # rows, inputs, outputs


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The device, the software and the date of a measurement."""

    device: str
    memory_gib: float
    system: str
    python: str
    torch_version: str
    qvl: str
    commit: str  # of the source checkout; empty if there is none
    date: str

    @classmethod
    def collect(cls, device: torch.device) -> RunInfo:
        """Describe this machine and checkout, now."""
        return cls(
            device=device_name(device),
            memory_gib=total_memory(device) / 2**30,
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            torch_version=torch.__version__,
            qvl=_version(),
            commit=_commit(),
            date=time.strftime("%Y-%m-%d %H:%M"),
        )


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best memory bandwidth and matmul rate of this machine, measured in this run: upper bounds for the rest."""

    read_gb_s: Spread
    gemm_gop_s: Spread  # torch's own 16-bit matmul
    how: str  # how memory was read

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, rounds: int = 7) -> Ceilings:
        """Read a buffer larger than the caches, and multiply two matrices of the model's size in `dtype`."""
        from qvl_kernels.bandwidth import reader

        read, nbytes, how = reader(device, READ_BYTES)
        rows, inputs, outputs = GEMM
        x, w = (torch.randn(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
        return cls(
            timed(read, rounds, device).rate(nbytes / 1e9),
            timed(lambda: x @ w.t(), rounds, device).rate(2 * rows * inputs * outputs / 1e9),
            how,
        )


def timed(call: Callable[[], object], rounds: int, device: torch.device) -> Spread:
    """Seconds per call, after one warm-up call."""
    samples = []
    for round_ in range(rounds + 1):
        finish(device)
        began = time.perf_counter()
        call()
        finish(device)
        if round_:
            samples.append(time.perf_counter() - began)
    return Spread.of(samples)


def finish(device: torch.device) -> None:
    """Wait for the device's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version() -> str:
    try:
        return version("qvl-runtime")
    except PackageNotFoundError:  # a checkout that is not installed; `commit` identifies it
        return "not installed"


def _commit() -> str:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
