"""Where and when something is measured, and what the machine can do at best: every figure stands beside these."""

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

READ_AT_ONCE = 1 << 29  # bytes: more than any cache
GEMM = (1024, 4096, 4096)  # rows, inputs, outputs


@dataclass(frozen=True, slots=True)
class Machine:
    """The device, the software, the day."""

    device: str
    memory_gib: float
    system: str
    python: str
    torch_version: str
    qvl: str
    commit: str  # of the checkout that runs; empty where it is none
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
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
    """The best of this machine in this run: nothing that is bound by memory or arithmetic can be faster."""

    read_gb_s: Spread
    gemm_gop_s: Spread  # torch's own product of 16-bit matrices
    how: str

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, rounds: int = 7) -> Ceilings:
        """Reads a buffer larger than the caches, and multiplies two matrices of the model's size in `dtype`."""
        from qvl_kernels.bandwidth import reader

        read, nbytes, how = reader(device, READ_AT_ONCE)
        rows, inputs, outputs = GEMM
        x, w = (torch.randn(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
        return cls(
            timed(read, rounds, device).rate(nbytes / 1e9),
            timed(lambda: x @ w.t(), rounds, device).rate(2 * rows * inputs * outputs / 1e9),
            how,
        )


def timed(call: Callable[[], object], rounds: int, device: torch.device) -> Spread:
    """Seconds a call, after one that is not counted."""
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
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version() -> str:
    try:
        return version("qvl-runtime")
    except PackageNotFoundError:  # a checkout that is not installed: its commit says more
        return "not installed"


def _commit() -> str:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
