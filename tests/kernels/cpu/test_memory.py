"""Outputs of ops on a CPU: shape, alignment, and reuse of freed memory by the next tensor."""

from __future__ import annotations

import os

import pytest
import torch

from qvl_kernels.cpu.memory import LARGE, LINE, empty, empty_like
from qvl_kernels.cpu.replay import Arena, Recording
from tests.kernels.conftest import AVAILABLE

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")]


@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 5), (333, 1001), (2, LARGE // 4), (3, 1, 12345)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_tensor_has_its_shape_alignment_and_own_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = empty(shape, dtype).fill_(1), empty(shape, dtype).fill_(2)
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    assert first.numel() == 0 or first.data_ptr() % LINE == 0
    assert bool((first == 1).all()) and bool((second == 2).all())


def test_empty_like_ignores_strides() -> None:
    x = torch.zeros(300, 400).t()
    assert empty_like(x).shape == (400, 300) and empty_like(x).is_contiguous()


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory apart")
def test_freed_memory_is_reused() -> None:
    """Holes between live tensors, as in a step; 100 KB, which glibc allocates in its heap."""
    tensors = [empty((100_000 + LINE,), torch.uint8) for _ in range(64)]
    freed = {tensor.data_ptr() for tensor in tensors[1::2]}
    del tensors[1::2]
    reallocated = [empty((100_000 + LINE,), torch.uint8) for _ in range(32)]
    # others may fill holes from before the test
    assert len(freed & {tensor.data_ptr() for tensor in reallocated}) >= 24


def test_a_recorded_step_keeps_its_memory() -> None:
    """Recorded calls hold addresses: memory returned to the heap could belong to another tensor at the replay."""
    from qvl_kernels import cpu

    x, weight = torch.randn(64, 512), torch.ones(512)
    recording, output = Recording.of(lambda: cpu.rms_norm(cpu.rms_norm(x, weight, 1e-6), weight, 1e-6), Arena())
    assert output.nbytes >= LARGE and recording.fallback_reason is None
    expected = output.clone()
    others = [empty_like(x).fill_(float(i)) for i in range(8)]
    assert torch.equal(recording.replay(), expected)
    assert all(bool((other == i).all()) for i, other in enumerate(others))
