"""The int8 kernels in Triton's interpreter, in float16, against the definition: shapes, groups, orders and regimes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts import gpu as gpu_layout
from qvl_kernels.layouts import repack
from tests.kernels.gptq import activations, check_product, checkpoint

pytest.importorskip("triton", reason="triton is not installed: `make setup`")
pytestmark = pytest.mark.interpreter

from qvl_kernels import triton as ops  # noqa: E402
from qvl_kernels.triton.linear import configs, dequantize, small_m  # noqa: E402

SHAPES = [  # inputs, outputs, group: one tile; outputs no multiple; a partial tile; a partial group; one group for all
    (64, 128, 64),
    (256, 24, 32),
    (160, 136, 64),
    (96, 8, 128),
    (224, 264, 224),
    (512, 256, 256),
]


check = partial(check_product, bits=8)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, configs.SMALL_M[8]])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_symmetric(poisoned: None, inputs: int, outputs: int, group: int, rows: int) -> None:
    tensors = checkpoint(inputs, outputs, group, bits=8, symmetric=True)
    x = activations(rows, inputs)
    check(ops.prepare_gptq(*tensors, 8, 1)(x), x, tensors)


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_zero_points_orders_and_bias(
    poisoned: None, inputs: int, outputs: int, group: int, act_order: bool, rows: int
) -> None:
    tensors = checkpoint(inputs, outputs, group, bits=8, act_order=act_order)
    x, bias = activations(rows, inputs), activations(1, outputs)[0]
    check(ops.prepare_gptq(*tensors, 8, 1, bias)(x), x, tensors, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_dequantized_weights_are_rounded_once(
    poisoned: None, inputs: int, outputs: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    tensors = checkpoint(inputs, outputs, group, bits=8, symmetric=symmetric)
    weight = repack.packed(gpu_layout.PackedInt8, *tensors, 1)
    assert torch.equal(dequantize.dequantize(weight, dtype), repack.dequantize(weight).to(dtype))


def test_many_rows_and_float32_take_the_dequantized_weight(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, bias = checkpoint(192, 40, 64, bits=8, act_order=True), activations(1, 40)[0]
    linear = ops.prepare_gptq(*tensors, 8, 1, bias)
    monkeypatch.delattr(small_m, "small_m_kernel")
    for x in (activations(configs.SMALL_M[8] + 1, 192), activations(2, 192, torch.float32)):
        check(linear(x), x, tensors, bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_large_weight_is_unpacked_some_outputs_at_a_time(
    poisoned: None, monkeypatch: pytest.MonkeyPatch, symmetric: bool, biased: bool
) -> None:
    tensors, x = checkpoint(192, 296, 64, bits=8, symmetric=symmetric), activations(2, 192, torch.float32)
    bias = activations(1, 296)[0] if biased else None
    linear = ops.prepare_gptq(*tensors, 8, 1, bias)
    whole = linear(x)
    # 128 outputs, 128 and 40
    monkeypatch.setattr(import_module("qvl_kernels.triton.linear.unpacked"), "AT_ONCE", 1)
    check(linear(x), x, tensors, bias)
    torch.testing.assert_close(linear(x), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_partial_sums_add_up(poisoned: None, rows: int) -> None:
    """Tiles that do not divide evenly among the splits. The bias is in one of them."""
    inputs = 64 * 49
    tensors, x, bias = checkpoint(inputs, 128, 128, bits=8), activations(rows, inputs), activations(1, 128)[0]
    linear = ops.prepare_gptq(*tensors, 8, 1, bias)
    parts = linear.forward_partial_sums(x)
    assert parts.shape == (3, rows, 128) and parts.dtype == torch.float32
    check(ops.sum_partials(parts, x.dtype), x, tensors, bias)
    assert torch.equal(linear(x), ops.sum_partials(parts, x.dtype))


def test_any_split_gives_the_sum(poisoned: None) -> None:
    tensors, x = checkpoint(320, 128, 64, bits=8), activations(2, 320)
    weight = repack.packed(gpu_layout.PackedInt8, *tensors, 1)
    for splits in (1, 2, 5, 7):  # 7: two programs have no tile
        out = small_m.small_m(x, weight, splits=splits)
        check(ops.sum_partials(out, x.dtype), x, tensors)


def test_large_and_small_activations_are_carried(poisoned: None) -> None:
    tensors = checkpoint(128, 128, 128, bits=8)
    for scale in (2.0**-14, 2.0**10):
        x = (activations(2, 128).float() * scale).half()
        check(ops.prepare_gptq(*tensors, 8, 1)(x), x, tensors)


@pytest.mark.parametrize("shape", [(2, 3, 128), (128,), (0, 128)])
def test_leading_axes_are_kept(poisoned: None, shape: tuple[int, ...]) -> None:
    tensors, x = checkpoint(128, 24, 32, bits=8), torch.randn(shape).half()
    y = ops.prepare_gptq(*tensors, 8, 1)(x)
    assert y.shape == (*shape[:-1], 24)
    check(y, x, tensors)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x[:, :64], r"x is float16 \[2, 64\], strided; expected contiguous float16 or bfloat16 \[any, 128\]"),
        (lambda x: x.double(), r"x is float64 \[2, 128\]"),
        (lambda x: x.repeat(33, 1), r"x has 66 rows; expected 1 to 64"),
    ],
)
def test_what_a_kernel_must_not_be_given_is_said(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    weight = repack.packed(gpu_layout.PackedInt8, *checkpoint(128, 24, 32, bits=8), 1)
    with pytest.raises(ValueError, match=message):
        small_m.small_m(spoil(activations(2, 128)), weight)


def test_a_zero_point_of_256_runs_in_plain_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tensors = list(checkpoint(128, 16, 128, bits=8))
    tensors[1] = torch.full_like(tensors[1], -1)
    with caplog.at_level(logging.WARNING, "qvl_kernels"):
        linear = ops.prepare_gptq(*tensors, 8, 1)
    assert "a linear of 16 outputs runs in plain torch, unpacked on each use: a zero point of 256" in caplog.text
    x = activations(3, 128)
    assert torch.equal(linear(x), reference.prepare_gptq(*tensors, 8, 1)(x))


def test_the_report_says_what_is_held() -> None:
    linear = ops.prepare_gptq(*checkpoint(256, 128, 64, bits=8, act_order=True), 8, 1)
    assert linear.kernel == "int8, groups of 64, zero points, act-order: x is gathered first"
    assert linear.nbytes == 256 * 128 + 4 * 128 * (2 + 1) + 256 * 4
