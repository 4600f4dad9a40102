"""The GPUs as the model sees them: units, clock, memory, and what each execution pipe takes in a clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvl_kernels.gpus import GPU, gpu_named


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU and the rates of its execution pipes."""

    label: str
    gpu: GPU  # copies reach 85 to 93 % of its published bandwidth
    clock: float  # Hz
    shared_per_sm: int  # bytes
    lanes: Mapping[str, int]  # thread results per clock and SM, by pipe
    mma_cycles: float  # of an SM's quarter, for one m16n8k16 of 16-bit floats
    warps_per_sm: int = 64
    programs_per_sm: int = 32
    registers_per_sm: int = 65536
    shared_reserved: int = 1024  # bytes a program

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second, whole chip: four schedulers an SM, one issue a clock each."""
        return self.gpu.sms * 4 * self.clock

    @property
    def shared_per_program(self) -> int:
        """The most shared memory that a program can have, in bytes."""
        return self.shared_per_sm - self.shared_reserved

    def occupancy(self, registers: int, shared: int, warps: int) -> tuple[int, str]:
        """Programs that one SM holds, and what limits them."""
        per_warp = max(math.ceil(registers * 32 / 256) * 256, 256)
        limits = {
            "warps": self.warps_per_sm // warps,
            "programs": self.programs_per_sm,
            "registers": self.registers_per_sm // per_warp // warps,
            "shared": self.shared_per_sm // (shared + self.shared_reserved),
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


# Rates: "Throughput of Native Arithmetic Instructions" in the CUDA programming guide; those of tensor cores from data
# sheets, with float32 sums: 154.8 TFLOPS of an RTX A6000, 165.2 of an RTX 4090 (an L4 or L40S has twice that of each
# multiprocessor). An H100 runs mma.sync at about 5/8 of its wgmma rate, hence 6.4 cycles instead of 4.
MACHINES = {
    "sm_80": Machine(
        "A100",
        gpu_named("A100-SXM4-80GB"),
        1.41e9,
        164 << 10,
        {"alu": 64, "fma": 64, "half": 128, "mufu": 16, "convert": 16, "lsu": 32},
        mma_cycles=8.0,
    ),
    "sm_86": Machine(
        "RTX A6000",
        gpu_named("RTX A6000"),
        1.80e9,
        100 << 10,
        {"alu": 64, "fma": 128, "half": 64, "mufu": 16, "convert": 16, "lsu": 32},
        mma_cycles=16.0,
        warps_per_sm=48,
        programs_per_sm=16,
    ),
    "sm_89": Machine(
        "RTX 4090",
        gpu_named("RTX 4090"),
        2.52e9,
        100 << 10,
        {"alu": 64, "fma": 128, "half": 64, "mufu": 16, "convert": 16, "lsu": 32},
        mma_cycles=32.0,
        warps_per_sm=48,
        programs_per_sm=24,
    ),
    "sm_90": Machine(
        "H100",
        gpu_named("H100 80GB HBM3"),
        1.70e9,
        228 << 10,
        {"alu": 64, "fma": 128, "half": 128, "mufu": 16, "convert": 16, "lsu": 32},
        mma_cycles=6.4,
    ),
}
