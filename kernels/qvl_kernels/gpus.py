"""The GPUs that the project knows: what plans, kernel configurations, the kernel report and benchmarks compute with.

Compute capability, multiprocessors and bandwidth are from the vendor's data sheets; memory is what the driver reports.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """One model of GPU."""

    name: str  # part of the name that the driver reports
    capability: int  # 10 * major + minor of the compute capability
    sms: int  # streaming multiprocessors
    memory_mib: int
    bandwidth_gb_s: int  # of the memory, 10^9 bytes per second
    key: str = ""  # its name in `qvl plan`; empty for variants that cannot be planned for

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return self.memory_mib << 20

    @property
    def bandwidth(self) -> int:
        """Memory bandwidth in bytes per second."""
        return self.bandwidth_gb_s * 10**9


GPUS = (
    GPU("A100-SXM4-40GB", 80, 108, 40960, 1555, "a100-40"),
    GPU("A100-SXM4-80GB", 80, 108, 81920, 2039, "a100-80"),
    GPU("A100 80GB PCIe", 80, 108, 81920, 1935),
    GPU("H100 80GB HBM3", 90, 132, 81559, 3350, "h100"),
    GPU("H100 PCIe", 90, 114, 81559, 2000),
    GPU("H200", 90, 132, 143771, 4800, "h200"),
    GPU("RTX 3090", 86, 82, 24576, 936, "3090"),
    GPU("RTX 4090", 89, 128, 24564, 1008, "4090"),
    GPU("RTX A6000", 86, 84, 49140, 768),
    GPU("A10", 86, 72, 23028, 600, "a10"),
    GPU("L4", 89, 58, 23034, 300, "l4"),
    GPU("L40S", 89, 142, 46068, 864, "l40s"),
)
UNSUPPORTED = {"t4": 75, "v100": 70, "p100": 60, "2080ti": 75}  # key: capability, lower than the kernels need


def gpu_named(name: str) -> GPU:
    """The GPU of this exact name; raises `KeyError` if the table lacks it."""
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise KeyError(f"no GPU is named {name!r}; known are {', '.join(gpu.name for gpu in GPUS)}")


def find_gpu(driver_name: str) -> GPU | None:
    """The GPU that the driver calls, for example, "NVIDIA A100-SXM4-80GB"; None if the table lacks it."""
    # no digit may follow: an L40S is no L4, and an A100 no A10
    return next((gpu for gpu in GPUS if re.search(rf"{re.escape(gpu.name)}(?!\d)", driver_name)), None)
