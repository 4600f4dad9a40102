"""A kernel with all its arguments, as a value: it can be run, or compiled ahead of time and judged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CAPABILITIES = (80, 86, 89, 90)  # that have configurations: A100, RTX 30 and A10, RTX 40 and L4, H100


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch: `arguments` in any order by name, `constants` the values of the tl.constexpr parameters."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]  # programs along each axis
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3  # of the software pipeline
    registers: int | None = None  # at most, a thread; None: the assembler weighs them against occupancy

    def with_arguments(self, **arguments: Tensor | int | float | None) -> Launch:
        """The same launch with further arguments."""
        return self._with(self.grid, {**self.arguments, **arguments}, self.constants)

    def with_constants(self, **constants: Any) -> Launch:
        """The same launch with further constants, or others."""
        return self._with(self.grid, self.arguments, {**self.constants, **constants})

    def with_grid(self, grid: tuple[int, ...]) -> Launch:
        """The same launch of another number of programs."""
        return self._with(grid, self.arguments, self.constants)

    def _with(self, grid: tuple[int, ...], arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> Launch:
        return Launch(self.kernel, grid, arguments, constants, self.warps, self.stages, self.registers)

    def options(self) -> dict[str, int]:
        """Options of Triton's compiler by name."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def run(self) -> None:
        """Queue it on the current stream of the current device; an empty grid launches nothing."""
        if all(self.grid):
            options: dict[str, Any] = self.options()
            if interpreted():
                options.pop("maxnreg", None)
            if self.constants.get("PDL"):  # set where the capability has it: `dependent`
                options["launch_pdl"] = True
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


class Spec(NamedTuple):
    """A launch for the static report, and the bars that it must pass."""

    name: str  # "int4 qkv, 1 row": the kernel, the place in the model, the rows
    launch: Launch  # its tensors may be on the meta device
    bytes_moved: int  # at least, between DRAM and the chip
    max_ratio: float | None = None  # busiest pipe or issue time / memory time; None for kernels that compute bounds
    min_wide: float = 0.0  # share of loaded bytes that must come in 128-bit loads
    from_registers: bool = False  # whether the main loop must write nothing to shared memory, such as unpacked weights
    loop_trips: float | None = None  # of the main loop in one program; None: inferred from bytes_moved
    flops: int = 0
    per_layer: int = 0  # launches in one decoder layer of a decode step with this many rows; 0: not part of one
    least_bytes: int = 0  # of bytes_moved: weights, keys and values, which no kernel fusion would save


@cache
def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 80 for any other, so that the interpreter runs what an A100 would."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: decided before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def counted(n: int, noun: str) -> str:
    """ "1 row", "16 rows"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
