"""The int4 kernel for mma.sync in Triton's interpreter: groups, dtypes, splits and buffers."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels.layouts import repack
from tests.kernels.gptq import activations, checkpoint
from tests.kernels.gptq import check_product as check

pytest.importorskip("triton", reason="triton is not installed: `make setup`")
pytestmark = pytest.mark.interpreter

from qvl_kernels import triton as ops  # noqa: E402
from qvl_kernels.triton.linear import configs, gemm  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", [(192, 136, 32), (320, 264, 64), (384, 128, 128)])
def test_the_product(inputs: int, outputs: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """65 rows are two tiles of them; a partial tile of inputs has groups of which some are past the end."""
    tensors, x = checkpoint(inputs, outputs, group, symmetric=symmetric), activations(65, inputs, dtype)
    bias = None if symmetric else activations(1, outputs, dtype)[0]
    weight = repack.packed_int4(*tensors, 1)
    parts = gemm.gemm(x, weight, bias)
    check(ops.sum_partials(parts, dtype), x, tensors, bias)


def test_splits_have_tiles_that_need_not_divide_evenly() -> None:
    """13 tiles in 3 splits, more than there are buffers; the bias is in one of them."""
    tensors, x, bias = checkpoint(13 * 128, 128, 128), activations(40, 13 * 128), activations(1, 128)[0]
    parts = gemm.gemm(x, repack.packed_int4(*tensors, 1), bias)
    assert parts.shape == (3, 40, 128) and parts.dtype == torch.float32
    check(ops.sum_partials(parts, x.dtype), x, tensors, bias)


@pytest.mark.parametrize("chosen", [(16, 128, 8, 2, 1), (32, 256, 4, 4, 2), (64, 128, 4, 2, 5)])
def test_other_tiles_and_buffers(chosen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPUs with little shared memory, and of a file; with 5 splits, most have one tile, fewer than buffers."""
    made = configs.Config(*chosen)
    monkeypatch.setattr(gemm, "config", lambda *asked: made)
    tensors, x = checkpoint(6 * 128, 256, 64), activations(33, 6 * 128)
    parts = gemm.gemm(x, repack.packed_int4(*tensors, 1))
    check(ops.sum_partials(parts, x.dtype), x, tensors)


@pytest.mark.parametrize("capability, shared", [(80, 163), (86, 99), (89, 99), (90, 227)])
@pytest.mark.parametrize("rows", [33, 64, 1023])
def test_two_programs_fit_a_multiprocessor(capability: int, shared: int, rows: int) -> None:
    made = configs.config(capability, "gemm", rows, 4096, 12288)
    held = made.stages * (made.rows * 128 * 2 + made.columns * 16 * 4) + 1024  # x and words; what each program reserves
    assert 2 * held <= shared + 1 << 10 and made.columns // made.warps == 32
