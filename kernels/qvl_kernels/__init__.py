"""Kernels of qvl_runtime: operations on tensors that know nothing of models.

Every module of ops offers the names and signatures of `qvl_kernels.reference`, which defines them in plain torch.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Protocol


class DeviceLike(Protocol):
    """A torch.device, or anything that says its type."""

    @property
    def type(self) -> str: ...


def ops_for(device: DeviceLike) -> ModuleType:
    """The module of ops to use on a device. This is the one place where it is chosen.

    `QVL_KERNELS=reference` asks for plain torch everywhere.
    """
    from qvl_kernels import reference

    if device.type != "cpu" or _reference_asked() or _cpu_fault() is not None:
        return reference
    from qvl_kernels import cpu

    return cpu


def packing_for(target: str) -> ModuleType:
    """The module that lays weights out for a target, "cpu" or "cuda", on any machine: pack_gptq and gptq_levels.

    Raises `RuntimeError` where that cannot be done here.
    """
    if target == "cpu":
        from qvl_kernels import cpu_linear
        from qvl_kernels.cpu_library import library

        library()
        return cpu_linear
    if target == "cuda":
        from qvl_kernels import repack

        return repack
    raise RuntimeError(f"this version has no layout for {target}")


def report(device: DeviceLike) -> dict[str, str]:
    """What runs on a device and why, one line each: said in `Engine.report()` and in the first log line."""
    if _reference_asked():
        return _plain_torch("QVL_KERNELS=reference asks for it")
    if device.type != "cpu":
        return _plain_torch(f"this version has no kernels for {device.type}")
    fault = _cpu_fault()
    if fault is not None:
        return _plain_torch(fault)
    from qvl_kernels.cpu_library import library

    used, available = library().instruction_set, ", ".join(library().available)
    return {"ops": f"C++ kernels ({used})", "why": f"this CPU and build have {available}; QVL_CPU_ISA chooses"}


def _plain_torch(why: str) -> dict[str, str]:
    return {
        "ops": "reference (plain torch)",
        "why": f"{why}: torch's own run, and int4 weights are unpacked on use",
    }


def _reference_asked() -> bool:
    asked = os.environ.get("QVL_KERNELS", "")
    if asked not in ("", "reference"):
        raise ValueError(f"QVL_KERNELS is {asked!r}; expected 'reference', or nothing for the fastest there is")
    return asked == "reference"


def _cpu_fault() -> str | None:
    """Why the CPU kernels do not run, or None. An instruction set asked for by name and not there is an error."""
    from qvl_kernels.cpu_library import LibraryError, library

    try:
        library()
    except LibraryError as fault:
        if os.environ.get("QVL_CPU_ISA"):
            raise
        return str(fault)
    return None
