"""Kernels of qvl_runtime: operations on tensors that know nothing of models.

Every module of ops offers the names and signatures of `qvl_kernels.reference`, which defines them in plain torch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qvl_kernels.ops import Ops, Packer

LEAST_CAPABILITY = (8, 0)  # bfloat16 tensor cores and cp.async, which the GPU kernels are built on


class UnsupportedError(RuntimeError):
    """The kernels of a device cannot run; the message says why and the way out."""


def ops_for(device: torch.device) -> Ops:
    """The module of ops to use on a device. This is the one place where it is chosen.

    `QVL_KERNELS=reference` asks for plain torch everywhere; `QVL_KERNELS=triton` for the GPU kernels on a CPU too, in
    Triton's interpreter. Raises `UnsupportedError` where a GPU's kernels cannot run: plain torch there is asked for,
    never fallen back to.
    """
    from qvl_kernels import reference

    asked = _asked()
    if asked == "reference":
        return reference
    if asked == "triton" or device.type == "cuda":
        _require_triton(device)
        from qvl_kernels import triton

        return triton
    if device.type != "cpu" or _cpu_fault() is not None:
        return reference
    from qvl_kernels import cpu

    return cpu


def target_on(device: torch.device) -> str:
    """The target, "cpu" or "cuda", whose layouts are read on a device: in Triton's interpreter the GPU's."""
    return "cuda" if _asked() == "triton" else device.type


def packing_for(target: str) -> Packer:
    """The module that lays weights out for a target, "cpu" or "cuda", on any machine: pack_gptq and unpack_to_qweight.

    Raises `RuntimeError` where that cannot be done here.
    """
    if target == "cpu":
        from qvl_kernels.cpu import linears as cpu_linear
        from qvl_kernels.cpu.library import library

        library()
        return cpu_linear
    if target == "cuda":
        from qvl_kernels.layouts import repack

        return repack
    raise RuntimeError(f"this version has no layout for {target}")


def report(device: torch.device) -> dict[str, str]:
    """What runs on a device and why, one line each: said in `Engine.report()` and in the first log line.

    Raises as `ops_for` does.
    """
    asked = _asked()
    if asked == "reference":
        return _plain_torch("QVL_KERNELS=reference asks for it")
    if asked == "triton" or device.type == "cuda":
        return _require_triton(device)
    if device.type != "cpu":
        return _plain_torch(f"this version has no kernels for {device.type}")
    fault = _cpu_fault()
    if fault is not None:
        return _plain_torch(fault)
    from qvl_kernels.cpu import attention as cpu_attention
    from qvl_kernels.cpu.library import FALLBACKS, library

    used, available = library().instruction_set, ", ".join(library().available)
    said = {"ops": f"C++ kernels ({used})", "why": f"this CPU and build have {available}; QVL_CPU_ISA chooses"}
    said["attention"] = cpu_attention.report()
    if FALLBACKS:
        said["in plain torch"] = "; ".join(f"{op}: {reason}" for op, reason in FALLBACKS.items())
    return said


def _require_triton(device: torch.device) -> dict[str, str]:
    """What is to be said of Triton's kernels on a device; raises `UnsupportedError` where they cannot run."""
    from importlib.metadata import version

    way_out = "use device='cpu', or set QVL_KERNELS=reference for plain torch, many times slower"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is None:
        raise UnsupportedError(
            f"the kernels for {device} need triton, which is not installed: pip install 'qvl-runtime[cuda]' "
            f"(in a checkout: make triton), or {way_out}"
        )
    if device.type != "cuda":
        if interpreted:
            return {
                "ops": "Triton kernels (interpreted)",
                "why": "QVL_KERNELS=triton asks for it: for tests, thousands of times slower than a GPU",
            }
        raise UnsupportedError(
            f"QVL_KERNELS is 'triton' and the device is {device}, where Triton's kernels run in its interpreter alone: "
            "set TRITON_INTERPRET=1 too, before Python starts, or use device='cuda'"
        )
    if interpreted:
        raise UnsupportedError(
            f"TRITON_INTERPRET is set, with which the kernels for {device} would run on the CPU: unset it"
        )
    import torch

    name, found = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise UnsupportedError(
            f"{device} ({name}) has compute capability {found[0]}.{found[1]}; the GPU kernels need 8.0 or higher "
            f"(A100, RTX 30 and what came after): {way_out}"
        )
    return {
        "ops": f"Triton kernels (sm_{found[0]}{found[1]})",
        "why": f"{name} has compute capability {found[0]}.{found[1]}; triton {version('triton')}",
    }


def _plain_torch(why: str) -> dict[str, str]:
    return {
        "ops": "reference (plain torch)",
        "why": f"{why}: torch's own run, and int4 weights are unpacked on use",
    }


def _asked() -> str:
    """What QVL_KERNELS asks for; empty: the fastest there is."""
    asked = os.environ.get("QVL_KERNELS", "")
    if asked not in ("", "reference", "triton"):
        raise ValueError(
            f"QVL_KERNELS is {asked!r}; expected 'reference', 'triton', or nothing for the fastest there is"
        )
    return asked


def _cpu_fault() -> str | None:
    """Why the CPU kernels do not run, or None. An instruction set asked for by name and not there is an error."""
    from qvl_kernels.cpu.library import LibraryError, library

    try:
        library()
    except LibraryError as fault:
        if os.environ.get("QVL_CPU_ISA"):
            raise
        return str(fault)
    return None
