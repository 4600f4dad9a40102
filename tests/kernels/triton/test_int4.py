"""The int4 kernels in Triton's interpreter, in float16, against the definition: shapes, groups, orders and regimes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts import repack
from tests.kernels.compare import as_good_as_torch
from tests.kernels.gptq import activations, checkpoint
from tests.kernels.gptq import check_product as check

pytest.importorskip("triton", reason="triton is not installed: `make setup`")
pytestmark = pytest.mark.interpreter

from qvl_kernels import triton as ops  # noqa: E402
from qvl_kernels.triton.linear import configs, dequantize, gemm, small_m, unpacked  # noqa: E402


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them, so that what it leaves out is seen."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: object, **options: object) -> Tensor:
        out = new_empty(self, *size, **options)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out  # type: ignore[no-any-return]

    monkeypatch.setattr(Tensor, "new_empty", filled)


SHAPES = [  # inputs, outputs, group: one tile; outputs no multiple; a partial tile; a partial group; one group for all
    (128, 128, 128),
    (256, 24, 32),
    (192, 136, 64),
    (192, 8, 128),
    (320, 264, 320),
    (512, 256, 256),
]


@pytest.mark.parametrize("rows", [1, 7, 16, 33])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_symmetric(inputs: int, outputs: int, group: int, rows: int) -> None:
    tensors = checkpoint(inputs, outputs, group, symmetric=True)
    x = activations(rows, inputs)
    check(ops.prepare_gptq(*tensors, 4, 1)(x), x, tensors)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_zero_points_orders_and_bias(inputs: int, outputs: int, group: int, act_order: bool, rows: int) -> None:
    tensors = checkpoint(inputs, outputs, group, act_order=act_order)
    x, bias = activations(rows, inputs), activations(1, outputs)[0]
    check(ops.prepare_gptq(*tensors, 4, 1, bias)(x), x, tensors, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_dequantized_weights_are_rounded_once(
    inputs: int, outputs: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = repack.packed_int4(*checkpoint(inputs, outputs, group, symmetric=symmetric), 1)
    assert torch.equal(dequantize.dequantize(weight, dtype), repack.dequantize(weight).to(dtype))


def test_very_many_rows_and_float32_take_the_dequantized_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, bias = checkpoint(192, 40, 64, act_order=True), activations(1, 40)[0]
    linear = ops.prepare_gptq(*tensors, 4, 1, bias)
    monkeypatch.delattr(small_m, "small_m_kernel")
    monkeypatch.delattr(gemm, "int4_gemm_kernel")
    for x in (activations(configs.DEQUANTIZE_M[4], 192), activations(2, 192, torch.float32)):
        check(linear(x), x, tensors, bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_large_weight_is_unpacked_some_outputs_at_a_time(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, biased: bool
) -> None:
    tensors, x = checkpoint(192, 296, 64, symmetric=symmetric), activations(2, 192, torch.float32)
    bias = activations(1, 296)[0] if biased else None
    linear = ops.prepare_gptq(*tensors, 4, 1, bias)
    whole = linear(x)
    # 128 outputs, 128 and 40
    monkeypatch.setattr(unpacked, "AT_ONCE", 1)
    check(linear(x), x, tensors, bias)
    torch.testing.assert_close(linear(x), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
def test_up_and_gate_are_unpacked_together(monkeypatch: pytest.MonkeyPatch, act_order: bool) -> None:
    """In pieces of 256, 256 and 128 outputs of each; float32 takes this way with any number of rows."""
    tensors, x = checkpoint(128, 1280, 64, act_order=act_order), activations(3, 128, torch.float32)
    linear = ops.prepare_gptq(*tensors, 4, 1, activations(1, 1280)[0])
    assert linear.gated is not None
    want = ops.swiglu(linear(x))
    for at_once in (unpacked.AT_ONCE, 2 * 256 * 128 * 4):
        monkeypatch.setattr(unpacked, "AT_ONCE", at_once)
        torch.testing.assert_close(linear.gated(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("act_order", [False, True])
def test_partial_sums_add_up(rows: int, act_order: bool) -> None:
    """Few rows: tiles that do not divide evenly among the splits. The bias is in one of them."""
    inputs = 128 * (49 if rows <= configs.SMALL_M[4] else 12)
    tensors, x = checkpoint(inputs, 128, 128, act_order=act_order), activations(rows, inputs)
    bias = activations(1, 128)[0]
    linear = ops.prepare_gptq(*tensors, 4, 1, bias)
    parts = linear.forward_partial_sums(x)
    assert parts.shape == (3, rows, 128) and parts.dtype == torch.float32  # as many tiles a program as it needs
    check(ops.sum_partials(parts, x.dtype), x, tensors, bias)
    assert torch.equal(linear(x), ops.sum_partials(parts, x.dtype))


@pytest.mark.parametrize("rows", [0, 1, 9, 33])
@pytest.mark.parametrize("inputs, outputs, act_order", [(256, 272, False), (192, 88, True)])
def test_swiglu_on_the_way_out_is_that_of_the_outputs(inputs: int, outputs: int, act_order: bool, rows: int) -> None:
    """Halves that are whole parts of programs, and halves that end in one; with many rows in a kernel of its own."""
    tensors, bias = checkpoint(inputs, outputs, 64, act_order=act_order), activations(1, outputs)[0]
    linear, x = ops.prepare_gptq(*tensors, 4, 1, bias), activations(rows, inputs)
    assert linear.gated is not None
    assert torch.equal(linear.gated(x), ops.swiglu(linear(x)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 9, 32])
@pytest.mark.parametrize("symmetric, group", [(True, 64), (False, 32), (True, 128), (False, 256)])
def test_few_rows_in_bfloat16(rows: int, symmetric: bool, group: int, bits: int) -> None:
    tensors, x = checkpoint(320, 136, group, bits=bits, symmetric=symmetric), activations(rows, 320, torch.bfloat16)
    exact = reference.gptq_dequantize(*tensors, bits, 1)
    plain = torch.nn.functional.linear(x, exact.to(torch.bfloat16))
    as_good_as_torch(ops.prepare_gptq(*tensors, bits, 1)(x), plain, x.double() @ exact.double().t())


@pytest.mark.parametrize("symmetric, group", [(True, 128), (True, 32), (False, 64)])
def test_a_row_does_not_depend_on_the_others(symmetric: bool, group: int) -> None:
    tensors, x = checkpoint(640, 128, group, symmetric=symmetric), activations(32, 640)
    linear = ops.prepare_gptq(*tensors, 4, 1)
    together = linear.forward_partial_sums(x)
    for rows in (1, 2, 8, 9, 16, 17):
        assert torch.equal(linear.forward_partial_sums(x[:rows]), together[..., :rows, :])


def test_any_split_gives_the_sum() -> None:
    tensors, x = checkpoint(640, 128, 128), activations(2, 640)
    weight = repack.packed_int4(*tensors, 1)
    for splits in (1, 2, 5, 7):  # 7: two programs have no tile
        out = small_m.small_m(x, weight, splits=splits)
        check(ops.sum_partials(out, x.dtype), x, tensors)


def test_subnormal_weights_keep_what_large_and_small_activations_carry() -> None:
    tensors = checkpoint(128, 128, 128)
    for scale in (2.0**-14, 2.0**10):
        x = (activations(2, 128).float() * scale).half()
        check(ops.prepare_gptq(*tensors, 4, 1)(x), x, tensors)


@pytest.mark.parametrize("shape", [(2, 3, 128), (128,), (0, 128)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    tensors, x = checkpoint(128, 24, 32), torch.randn(shape).half()
    y = ops.prepare_gptq(*tensors, 4, 1)(x)
    assert y.shape == (*shape[:-1], 24)
    check(y, x, tensors)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x[:, :64], r"x is float16 \[2, 64\], strided; expected contiguous float16 or bfloat16 \[any, 128\]"),
        (lambda x: x.double(), r"x is float64 \[2, 128\]"),
        (lambda x: x.repeat(17, 1), r"x has 34 rows; expected 1 to 32"),
    ],
)
def test_what_a_kernel_must_not_be_given_is_said(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    weight = repack.packed_int4(*checkpoint(128, 24, 32), 1)
    with pytest.raises(ValueError, match=message):
        small_m.small_m(spoil(activations(2, 128)), weight)


def test_what_has_no_kernel_runs_in_plain_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tensors = checkpoint(128, 16, 16)
    with caplog.at_level(logging.WARNING, "qvl_kernels"):
        linear = ops.prepare_gptq(*tensors, 4, 1)
    assert "a linear of 16 outputs runs in plain torch, unpacked on each use: groups of 16" in caplog.text
    assert linear.kernel == "int4, unpacked on use (groups of 16)"
    x = activations(3, 128)
    assert torch.equal(linear(x), reference.prepare_gptq(*tensors, 4, 1)(x))


def test_the_report_says_what_is_held() -> None:
    linear = ops.prepare_gptq(*checkpoint(256, 128, 64, act_order=True), 4, 1)
    assert linear.kernel == "int4, groups of 64, zero points, act-order: x is gathered first"
    assert linear.nbytes == 256 * 128 // 2 + 4 * 128 * (2 + 1) + 256 * 4


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512])
@pytest.mark.parametrize("inputs, outputs", [(4096, 12288), (11008, 4096), (128, 128), (320, 384)])
def test_configurations_cover_what_they_are_given(capability: int, rows: int, inputs: int, outputs: int) -> None:
    kind = configs.regime(4, rows, torch.float16)
    made = configs.config(capability, kind, rows, inputs, outputs)
    assert outputs % made.columns == 0 and made.rows & (made.rows - 1) == 0
    assert 1 <= made.splits <= max(1, inputs // 128 // configs.LEAST_TILES[kind])
    assert kind == "gemm" or made.rows >= rows
    if kind == "small_m":
        assert made._replace(rows=8) == configs.config(capability, kind, 1, inputs, outputs)


def test_a_file_of_configurations_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "configs.json"
    monkeypatch.setenv("QVL_KERNEL_CONFIGS", str(named))
    named.write_text(json.dumps({"90": {"small_m 4096 4096": [8, 64, 8, 4, 6]}}))
    configs.overrides.cache_clear()
    try:
        assert configs.config(90, "small_m", 1, 4096, 4096) == (8, 64, 8, 4, 6)
        assert configs.config(80, "small_m", 1, 4096, 4096) != (8, 64, 8, 4, 6)
        named.write_text(json.dumps({"90": {"small_m 4096 4096": [8, 96, 8, 4, 6]}}))
        configs.overrides.cache_clear()
        with pytest.raises(ValueError, match=r"'small_m 4096 4096' is \[8, 96, 8, 4, 6\]; expected"):
            configs.config(90, "small_m", 1, 4096, 4096)
        for text in ("[]", "{", '{"90": 3}', '{"sm_90": {"small_m 4096 4096": [8, 64, 8, 4, 6]}}'):
            named.write_text(text)
            with pytest.raises(ValueError, match=r"configs\.json, which cannot be read \(.*expected the JSON file"):
                configs.overrides()
    finally:
        monkeypatch.delenv("QVL_KERNEL_CONFIGS")
        configs.overrides.cache_clear()
