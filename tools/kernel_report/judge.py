"""Judge a kernel on a GPU: its instruction counts, the lower bounds on its time, and whether it meets its bars.

Three lower bounds on the time of a launch: memory (bytes_moved over the published bandwidth), issue slots (all warp
instructions over four a clock and SM) and the busiest execution pipe. They are necessary, not sufficient: latency,
the L2, bank conflicts, the last partial wave and the launch itself are not in the model. A kernel whose ratio
(issue or pipe over memory) is 2 cannot be bound by memory; one of 0.5 can be, and need not be. What a kernel does
before it waits for the one before it (programmatic dependent launch) is not counted: it runs while that one does.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from qvl_kernels.triton.launch import Spec
from tools.kernel_report import sass
from tools.kernel_report.compile import MachineCode, compile_launch
from tools.kernel_report.machines import MACHINES, Machine

# What a kernel may spill: ptxas saves a value or two even below 64 registers, each version in other kernels. That is
# bytes a thread, and the share of a loop's instructions.
MOST_SPILLED, MOST_SPILL_SHARE = 16, 0.01


class Fault(NamedTuple):
    """A reason why a kernel fails the report."""

    status: int  # of the report's exit: 1 does not compile or run, 2 spills, 3 misses a bar
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """Everything the report knows about one kernel on one target; sizes in bytes, times in microseconds."""

    kernel: str
    target: str
    error: str = ""  # the compiler's message; the other fields are then unset
    registers: int = 0
    spilled: int = 0  # a thread
    spill_share: float = 0.0  # of a loop's instructions
    shared: int = 0  # a program
    most_shared: int = 0  # that one can have; 0: not known
    programs_per_sm: int = 0
    occupancy: float = 0.0
    limit: str = ""  # of the occupancy
    instructions: int = 0
    loop: int = 0  # instructions of the main loop
    mix: dict[str, int] | None = None  # of the main loop, by class
    widest: int = 0  # bits of the widest load
    wide: float = 0.0  # share of the loop's loaded bytes in 128-bit loads
    bytes_moved: int = 0
    memory_us: float = 0.0
    issue_us: float = 0.0
    pipe_us: float = 0.0
    pipe: str = ""  # the busiest
    tflops: float = 0.0  # at the bound
    ratio: float = 0.0
    max_ratio: float | None = None
    min_wide: float = 0.0
    per_layer: int = 0
    least_bytes: int = 0
    shared_stores: int = 0  # of the main loop, asynchronous copies not counted
    from_registers: bool = False  # whether there may be none

    @property
    def bound_us(self) -> float:
        """The lower bound on the time of one launch, in microseconds."""
        return max(self.memory_us, self.issue_us, self.pipe_us)

    @property
    def faults(self) -> list[Fault]:
        """Why the kernel fails; empty if it passes."""
        if self.error:
            return [Fault(1, f"does not compile: {self.error}")]
        faults = []
        if self.most_shared and self.shared > self.most_shared:
            faults.append(Fault(1, f"does not run: needs {self.shared} bytes of shared memory of {self.most_shared}"))
        if self.spilled > MOST_SPILLED or self.spill_share > MOST_SPILL_SHARE:
            faults.append(Fault(2, f"spills {self.spilled} bytes of registers a thread"))
        if self.max_ratio is not None and self.ratio > self.max_ratio:
            faults.append(Fault(3, f"exceeds the ratio: {self.ratio:.2f}, bar {self.max_ratio}"))
        if self.wide < self.min_wide:
            faults.append(Fault(3, f"loads {self.wide:.0%} of its bytes 128 bits at a time, bar {self.min_wide:.0%}"))
        if self.from_registers and self.shared_stores:
            faults.append(Fault(3, f"sends weights through shared memory: {self.shared_stores} stores in its loop"))
        return faults


def judge(spec: Spec, target: str) -> tuple[Row, str]:
    """Compile a kernel for a target; returns its row and its disassembly."""
    machine = MACHINES[target]
    try:
        code = compile_launch(spec.launch, machine.gpu.capability)
    except Exception as fault:  # the compiler raises many kinds; each becomes the row's error
        lines = str(fault).strip().splitlines() or [""]
        return Row(spec.name, target, error=f"{type(fault).__name__}: {lines[-1][:200]}"), ""
    return _row(spec, target, machine, code), code.sass


def _row(spec: Spec, target: str, machine: Machine, code: MachineCode) -> Row:
    text = sass.parse(code.sass)
    loop = sass.main_loop(text)
    loaded = sass.loads(loop or text.instructions)
    resident, limit = machine.occupancy(code.registers, code.shared, code.warps)
    pipes = _pipe_times(spec, machine, sass.after_wait(text.instructions), loop, code.warps)
    issue = pipes.pop("issue")
    pipe = max(pipes, key=lambda name: pipes[name])
    memory = spec.bytes_moved / machine.gpu.bandwidth
    classes = [sass.classify(line).name for line in text.instructions]
    return Row(
        kernel=spec.name,
        target=target,
        registers=code.registers,
        spilled=code.stack if "spill" in classes else 0,
        spill_share=sass.spill_share(text),
        shared=code.shared,
        most_shared=machine.shared_per_program,
        programs_per_sm=resident,
        occupancy=resident * code.warps / machine.warps_per_sm,
        limit=limit,
        instructions=len(text.instructions),
        loop=len(loop),
        mix=dict(Counter(sass.classify(line).name for line in loop or text.instructions).most_common()),
        widest=8 * max(loaded, default=0),
        wide=sum(n for n in loaded if n == 16) / max(sum(loaded), 1),
        bytes_moved=spec.bytes_moved,
        memory_us=memory * 1e6,
        issue_us=issue * 1e6,
        pipe_us=pipes[pipe] * 1e6,
        pipe=pipe,
        tflops=spec.flops / max(memory, issue, pipes[pipe]) / 1e12,
        ratio=max(issue, pipes[pipe]) / memory,
        max_ratio=spec.max_ratio,
        min_wide=spec.min_wide,
        per_layer=spec.per_layer,
        least_bytes=spec.least_bytes,
        shared_stores=sum(line.startswith(("STS", "STSM")) for line in loop),
        from_registers=spec.from_registers,
    )


def _pipe_times(spec: Spec, machine: Machine, instructions: list[str], loop: list[str], warps: int) -> dict[str, float]:
    """Seconds that each pipe needs for one launch; instructions outside the main loop count once per warp."""
    programs = math.prod(spec.launch.grid)
    once, each = sass.pipe_cycles(machine, instructions), sass.pipe_cycles(machine, loop)
    loop_bytes = sum(sass.loads(loop)) * 32 * warps
    trips = spec.loop_trips
    if trips is None:
        trips = spec.bytes_moved / (programs * loop_bytes) if loop_bytes else 1.0
    return {
        pipe: (cycles + each.get(pipe, 0.0) * (trips - 1)) * programs * warps / machine.issue_rate
        for pipe, cycles in once.items()
    }
