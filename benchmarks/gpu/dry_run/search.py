"""The tuner's candidates on pretended GPUs: compiled, but not run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu.dry_run import pretended_gpu
from benchmarks.gpu.dry_run.binding import SHARED, Key, Needs
from benchmarks.gpu.place import Place
from benchmarks.gpu.search_space import candidates, kinds, op_of, operands
from qvl_kernels.gpus import gpu_named

if TYPE_CHECKING:
    from qvl_kernels.triton.linear.configs import Config, Regime

FEW = 16  # bytes a thread on the stack that are no fault: the kernel report's MOST_SPILLED
TARGETS = ("A100-SXM4-80GB", "H100 80GB HBM3")


class Share(NamedTuple):
    """The candidates of one kernel and linear for one GPU."""

    gpu: str
    kind: Regime
    name: str


class Checked(NamedTuple):
    """A candidate for a linear: its kernel and what that needs, or why it does not compile."""

    label: str
    config: Config
    most_shared: int  # bytes that a program of the GPU can have
    key: Key | None = None
    needs: Needs | None = None
    error: str = ""

    @property
    def spills(self) -> bool:
        """Whether more than a value or two are spilled to the stack."""
        return self.needs is not None and self.needs.stack > FEW

    @property
    def too_large(self) -> bool:
        """Whether it needs more shared memory than there is."""
        return self.needs is not None and self.needs.shared > self.most_shared

    @property
    def fault(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.error:
            return f"does not compile: {self.error}"
        found = [f"spills {self.needs.stack} bytes a thread"] if self.needs and self.spills else []
        if self.needs and self.too_large:
            found.append(f"needs {self.needs.shared} bytes of shared memory, and there are {self.most_shared}")
        return ", ".join(found)


def shares(gpu: str, only: str = "") -> list[Share]:
    """All of one GPU whose kernel and linear, such as "gemm out", match the pattern."""
    from qvl_kernels.triton.linear.published_shapes import DECODER

    pairs = product(kinds(gpu_named(gpu).capability), DECODER)
    return [Share(gpu, kind, name) for kind, name in pairs if re.search(only, f"{kind} {name}")]


def check_share(job: Share) -> list[Checked]:
    """Compile each candidate of a share."""
    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear import configs
    from qvl_kernels.triton.linear.published_shapes import SHAPES

    inputs, outputs = SHAPES[job.name]
    label = f"{job.kind} {inputs} {outputs}"
    checked: list[Checked] = []
    capability.cache_clear()  # it may know another GPU
    try:
        with pretended_gpu(compiles=True, name=job.gpu) as bound:
            place, here = Place.find(), gpu_named(job.gpu).capability
            op, (x, weight, _) = op_of(job.kind), operands(job.kind, inputs, outputs, place.device)
            for made in candidates(job.kind, here, inputs, outputs):
                configs.overrides()[here, label] = made
                bound.used.clear()
                try:
                    op(x, weight)
                except Exception as fault:  # the compiler raises many kinds
                    last = (str(fault).strip().splitlines() or [""])[-1]
                    error = f"{type(fault).__name__}: {last[:200]}"
                    checked.append(Checked(label, made, SHARED[here], error=error))
                    continue
                (key,) = bound.used
                checked.append(Checked(label, made, SHARED[here], key, bound.needs[key]))
            configs.overrides().pop((here, label), None)
    finally:
        capability.cache_clear()
    return checked


def summary(gpu: str, checked: Sequence[Checked]) -> str:
    """One line that counts candidates, their kernels, and what is wrong with them."""
    binaries = {(one.label, one.key) for one in checked if one.key is not None}
    counts = [
        f"{sum(bool(one.error) for one in checked)} do not compile",
        f"{sum(one.spills for one in checked)} spill",
    ]
    counts.append(f"{sum(one.too_large for one in checked)} exceed its shared memory")
    return f"{gpu}: {len(checked)} candidates in {len(binaries)} kernels: {', '.join(counts)}"
