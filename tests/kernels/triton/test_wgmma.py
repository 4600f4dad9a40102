"""The int4 kernel for wgmma in Triton's interpreter, and when it runs."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels.layouts import repack
from tests.kernels.gptq import activations, checkpoint
from tests.kernels.gptq import check_product as check

pytest.importorskip("triton", reason="triton is not installed: `make setup`")
pytestmark = pytest.mark.interpreter

from qvl_kernels import triton as ops  # noqa: E402
from qvl_kernels.triton.linear import configs, gemm, linears, wgmma  # noqa: E402

# inputs, outputs, group: one tile; one group for all; a partial tile and group; groups of two tiles
SHAPES = [(128, 128, 128), (320, 264, 320), (192, 136, 128), (512, 256, 256)]


@pytest.mark.parametrize("rows", [1, 64, 65, 130])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_the_product(inputs: int, outputs: int, group: int, symmetric: bool, rows: int) -> None:
    tensors, x = checkpoint(inputs, outputs, group, symmetric=symmetric), activations(rows, inputs)
    bias = None if symmetric else activations(1, outputs)[0]
    check(wgmma.wgmma(x, repack.packed_int4(*tensors, 1), bias), x, tensors, bias)


def test_bfloat16() -> None:
    tensors, x = checkpoint(256, 128, 128), activations(70, 256, torch.bfloat16)
    check(wgmma.wgmma(x, repack.packed_int4(*tensors, 1)), x, tensors)


def test_splits_have_tiles_that_need_not_divide_evenly() -> None:
    """13 tiles in 3 splits, more than there are buffers; the bias is in one of them."""
    tensors, x, bias = checkpoint(13 * 128, 128, 128), activations(66, 13 * 128), activations(1, 128)[0]
    parts = wgmma.wgmma(x, repack.packed_int4(*tensors, 1), bias)
    assert parts.shape == (3, 66, 128) and parts.dtype == torch.float32
    check(ops.sum_partials(parts, x.dtype), x, tensors, bias)


def test_a_linear_takes_it_where_the_gpu_has_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, x = checkpoint(256, 128, 128, act_order=True), activations(65, 256)
    linear = ops.prepare_gptq(*tensors, 4, 1)
    monkeypatch.setattr(linears, "capability", lambda device: 90)
    monkeypatch.setattr(configs, "wgmma_rows", lambda: (33, 1023))
    monkeypatch.delattr(gemm, "int4_gemm_kernel")
    check(linear(x), x, tensors)


def test_which_rows_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    configs.wgmma_rows.cache_clear()
    monkeypatch.delenv("QVL_INT4_WGMMA", raising=False)

    def kinds(wgmma: bool = True) -> list[str]:
        return [configs.regime(4, rows, torch.float16, wgmma) for rows in (32, 33, 1023, 1024)]

    try:
        assert kinds() == ["small_m", "wgmma", "wgmma", "dequantize"]
        assert kinds(False) == ["small_m", "gemm", "gemm", "dequantize"]
        assert configs.regime(4, 100, torch.float32, True) == "dequantize"
        without, later = ["small_m", "gemm", "gemm", "dequantize"], ["small_m", "gemm", "wgmma", "wgmma"]
        for asked, want in (("0", without), ("1000-4095", later)):
            monkeypatch.setenv("QVL_INT4_WGMMA", asked)
            configs.wgmma_rows.cache_clear()
            assert kinds() == want
        monkeypatch.setenv("QVL_INT4_WGMMA", "many")
        configs.wgmma_rows.cache_clear()
        with pytest.raises(ValueError, match="QVL_INT4_WGMMA is 'many'; expected rows such as '33-1023', or '0'"):
            kinds()
    finally:
        configs.wgmma_rows.cache_clear()


@pytest.mark.parametrize("rows", [33, 64, 65, 128, 512, 1023])
@pytest.mark.parametrize("inputs, outputs", [(4096, 12288), (4096, 4096), (11008, 4096), (128, 128)])
def test_programs_fill_the_gpu_without_more_splits_than_that(inputs: int, outputs: int, rows: int) -> None:
    made = configs.config(90, "wgmma", rows, inputs, outputs)
    programs = -(-rows // made.rows) * (outputs // made.columns)
    assert made.splits == 1 or programs * made.splits <= 132
    assert 1 <= made.splits <= max(1, inputs // 128 // configs.LEAST_TILES["gemm"])


@pytest.mark.parametrize("bits, group", [(8, 128), (4, 64)])
def test_other_weights_are_refused(bits: int, group: int) -> None:
    weight = repack.pack_gptq(*checkpoint(256, 128, group, bits=bits), bits, 1)
    bound = ops.bind(weight)
    assert isinstance(bound.call, linears.PackedLinear) and not wgmma.takes(bound.call.weight)
    with pytest.raises(ValueError, match=f"int{bits} in groups of {group}; expected int4 in whole tiles"):
        wgmma.plan_wgmma(activations(65, 256), bound.call.weight)
