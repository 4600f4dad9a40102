"""A GPU that is only pretended: the whole suite runs on it, line by line, where there is none.

Tensors of the device have shapes, dtypes and devices, but no numbers (`tensors`); torch.cuda answers as on an H100
(`cuda`); a kernel's launch is bound to its arguments by Triton and, if wanted, compiled, but not run (`binding`).
So an error of Python, of shapes, of devices, of Triton's binding or of its compiler shows here, and not first on a
machine that is lent for minutes. Numbers, races and times do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.dry_run.binding import Bound, bound_launches
from benchmarks.gpu.dry_run.cuda import GPU, pretended_cuda
from benchmarks.gpu.dry_run.tensors import pretended_tensors
from qvl_kernels.gpus import gpu_named
from qvl_kernels.layouts.interleave import WORDS, from_tiles, to_tiles
from qvl_kernels.util import cdiv

__all__ = ["pretended_gpu"]
Rows = Callable[[Tensor, int, int], Tensor]


def even_groups(inputs: int, groups: int, g_idx: Tensor | None) -> tuple[int, Tensor | None, bool]:
    """`repack._grouping` for an act-order without numbers: equal groups in some order."""
    return cdiv(inputs, groups), None if g_idx is None else g_idx.to(torch.int32), True


def by_shape(original: Rows, shape: Callable[[Tensor, int], tuple[int, ...]]) -> Rows:
    """A function of `interleave`, whose small steps would take minutes here: a tensor of the result's shape."""

    def made(words: Tensor, bits: int, outputs: int) -> Tensor:
        return original(words, bits, outputs) if words.device.type == "cpu" else words.new_empty(shape(words, outputs))

    return made


@contextmanager
def pretended_gpu(compiles: bool = False, name: str = GPU) -> Iterator[Bound]:
    """Pretend that this process has a GPU; yields what is launched on it. compiles: compile every kernel, too."""
    with ExitStack() as stack:
        bound = stack.enter_context(bound_launches(compiles, gpu_named(name).capability))
        stack.enter_context(pretended_cuda(bound, name))
        stack.enter_context(pretended_tensors())
        stack.enter_context(patch("qvl_kernels.layouts.repack._grouping", even_groups))
        tiles = by_shape(to_tiles, lambda qweight, outputs: (cdiv(len(qweight), WORDS), outputs, WORDS))
        stack.enter_context(patch("qvl_kernels.layouts.repack.to_tiles", tiles))
        rows = by_shape(from_tiles, lambda words, outputs: (len(words) * WORDS, outputs))
        stack.enter_context(patch("qvl_kernels.layouts.repack.from_tiles", rows))
        stack.enter_context(patch("benchmarks.gpu.processes.workers_here", lambda: 0))  # no other process pretends
        yield bound
