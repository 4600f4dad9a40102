"""Every GPU kernel at the published model's shapes, to be compiled and judged on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl_kernels.triton.launch import Spec


def aot_specs(capability: int) -> Iterator[Spec]:
    """The lists of all files of `qvl_kernels.triton`, configured for a capability such as 80 or 90."""
    from qvl_kernels import triton

    for found in iter_modules(triton.__path__):
        module = import_module(f"qvl_kernels.triton.{found.name}")
        if hasattr(module, "aot_specs"):
            yield from module.aot_specs(capability)
