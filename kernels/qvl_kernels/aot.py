"""Every GPU kernel at the published model's shapes, to compile and check on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl_kernels.triton.launch import Spec


def aot_specs(capability: int) -> Iterator[Spec]:
    """Yield the specs of all modules of `qvl_kernels.triton`, configured for a capability such as 80 or 90."""
    from qvl_kernels import triton

    for info in walk_packages(triton.__path__, "qvl_kernels.triton."):
        module = import_module(info.name)
        if hasattr(module, "aot_specs"):
            yield from module.aot_specs(capability)
