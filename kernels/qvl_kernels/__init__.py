"""Kernels of qvl_runtime: operations on tensors that know nothing of models.

`qvl_kernels.reference` defines every op in plain torch. `cpu` (C++) and `triton` (GPU) implement the same names and
signatures.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qvl_kernels.ops import Ops, Packer

LEAST_CAPABILITY = (8, 0)  # the GPU kernels need bfloat16 tensor cores and cp.async


class UnsupportedError(RuntimeError):
    """The kernels of a device cannot run; the message says why and what to do about it."""


def ops_for(device: torch.device, batch_invariant: bool = False) -> Ops:
    """Choose the implementation of the ops for a device. No other code makes this choice.

    batch_invariant: one in which a row's bits do not depend on the other rows; the CPU's always is one.

    `QVL_KERNELS=reference` selects plain torch on every device; `QVL_KERNELS=triton` selects the GPU kernels on a CPU
    too, in Triton's interpreter. Raises `UnsupportedError` if a GPU's kernels cannot run: plain torch must be requested
    explicitly; there is no silent fallback.
    """
    from qvl_kernels import reference

    requested = _requested_ops()
    if requested == "reference":
        return reference
    if requested == "triton" or device.type == "cuda":
        _require_triton(device)
        if batch_invariant:
            from qvl_kernels.triton import invariant

            return invariant
        from qvl_kernels import triton

        return triton
    if device.type != "cpu" or _cpu_fault() is not None:
        return reference
    from qvl_kernels import cpu

    return cpu


def target_on(device: torch.device) -> str:
    """Return "cpu" or "cuda", the target whose weight layouts a device reads; Triton's interpreter reads the GPU's."""
    return "cuda" if _requested_ops() == "triton" else device.type


def packing_for(target: str) -> Packer:
    """Return the module that packs weights for a target, "cpu" or "cuda": pack_gptq and unpack_to_qweight.

    It works on any machine, with or without the target's device. Raises `RuntimeError` if it cannot run here.
    """
    if target == "cpu":
        from qvl_kernels.cpu import linears as cpu_linear
        from qvl_kernels.cpu.library import library

        library()
        return cpu_linear
    if target == "cuda":
        from qvl_kernels.layouts import repack

        return repack
    raise RuntimeError(f"this version has no layout for {target!r}; expected 'cpu' or 'cuda'")


def report(device: torch.device) -> dict[str, str]:
    """Describe which kernels run on a device and why, one line each, for `Engine.report()` and the first log line.

    Raises as `ops_for` does, and `ValueError` for a setting of the kernels that cannot be followed.
    """
    requested = _requested_ops()
    if requested == "reference":
        return _reference_report("QVL_KERNELS=reference requests it")
    if requested == "triton" or device.type == "cuda":
        lines = _require_triton(device)
        from qvl_kernels.triton_settings import asked_wgmma_rows

        asked_wgmma_rows()
        if os.environ.get("QVL_KERNEL_CONFIGS"):
            from qvl_kernels.triton.linear.configs import overrides  # imports Triton

            overrides()
        return lines
    if device.type != "cpu":
        return _reference_report(f"this version has no kernels for {device.type}")
    fault = _cpu_fault()
    if fault is not None:
        return _reference_report(fault)
    from qvl_kernels.cpu import attention as cpu_attention
    from qvl_kernels.cpu.library import FALLBACKS, library

    used, available = library().instruction_set, ", ".join(library().available)
    lines = {
        "ops": f"C++ kernels ({used})",
        "why": f"this CPU and build support {available}; QVL_CPU_ISA selects one",
        "attention": cpu_attention.report(),
    }
    if FALLBACKS:
        lines["in plain torch"] = "; ".join(f"{op}: {reason}" for op, reason in FALLBACKS.items())
    return lines


def _require_triton(device: torch.device) -> dict[str, str]:
    """Return the report on Triton's kernels for a device, or raise `UnsupportedError` if they cannot run."""
    from importlib.metadata import version

    way_out = "use device='cpu', or set QVL_KERNELS=reference for plain torch, which is many times slower"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is None:
        raise UnsupportedError(
            f"the kernels for {device} need triton, which is not installed: pip install 'qvl-runtime[cuda]' "
            f"(in a checkout: make setup), or {way_out}"
        )
    if device.type != "cuda":
        if interpreted:
            return {
                "ops": "Triton kernels (interpreted)",
                "why": "QVL_KERNELS=triton requests it: for tests, thousands of times slower than a GPU",
            }
        raise UnsupportedError(
            f"QVL_KERNELS is 'triton' and the device is {device}, where Triton's kernels run only in its interpreter: "
            "set TRITON_INTERPRET=1 as well, before Python starts, or use device='cuda'"
        )
    if interpreted:
        raise UnsupportedError(
            f"TRITON_INTERPRET is set, which would run the kernels for {device} on the CPU: unset it"
        )
    import torch

    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UnsupportedError(
            f"{device} ({name}) has compute capability {capability[0]}.{capability[1]}; the GPU kernels need 8.0 or "
            f"higher (A100, RTX 30 series and later): {way_out}"
        )
    return {
        "ops": f"Triton kernels (sm_{capability[0]}{capability[1]})",
        "why": f"{name} has compute capability {capability[0]}.{capability[1]}; triton {version('triton')}",
    }


def _reference_report(why: str) -> dict[str, str]:
    return {
        "ops": "reference (plain torch)",
        "why": f"{why}: torch's own kernels are used, and int4 weights are unpacked on each use",
    }


def _requested_ops() -> str:
    """The value of QVL_KERNELS; empty means the fastest implementation available."""
    requested = os.environ.get("QVL_KERNELS", "")
    if requested not in ("", "reference", "triton"):
        raise ValueError(
            f"QVL_KERNELS is {requested!r}; expected 'reference', 'triton', or unset for the fastest available"
        )
    return requested


def _cpu_fault() -> str | None:
    """Why the CPU kernels cannot run, or None. Raises if QVL_CPU_ISA names an instruction set that is unavailable."""
    from qvl_kernels.cpu.library import LibraryError, library

    try:
        library()
    except LibraryError as fault:
        if os.environ.get("QVL_CPU_ISA"):
            raise
        return str(fault)
    return None
