"""Kernels of qvl_runtime: operations on tensors that know nothing of models.

Every module of ops offers the names and signatures of `qvl_kernels.reference`, which defines them in plain torch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol


class DeviceLike(Protocol):
    """A torch.device, or anything that says its type."""

    @property
    def type(self) -> str: ...


def ops_for(device: DeviceLike) -> ModuleType:
    """The module of ops to use on a device. This is the one place where it is chosen."""
    from qvl_kernels import reference

    return reference


def report(device: DeviceLike) -> dict[str, str]:
    """What runs on a device and why, one line each: said in `Engine.report()` and in the first log line."""
    return {
        "ops": "reference (plain torch)",
        "why": f"this version has no kernels for {device.type}: torch's own run, and int4 weights are unpacked on use",
    }
