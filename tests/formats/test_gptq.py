"""GPTQ records, packing and rounding, against the formula of the format written out bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qvl_kernels.reference import gptq_dequantize, pack_rows
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from qvl_runtime.weights.checkpoint import load_state
from tests.gptq_checkpoints import quantize_state

HALF = 2.0**-11  # float16's rounding, relative


def unpack_rows(packed: torch.Tensor, bits: int) -> np.ndarray:
    """Value i of a column: bits `bits * s` and up of int32 r, where i = r * (32 / bits) + s."""
    unsigned = packed.numpy().view(np.uint32)
    per_int32 = 32 // bits
    rows = [
        (unsigned[i // per_int32] >> (bits * (i % per_int32))) & (2**bits - 1) for i in range(len(packed) * per_int32)
    ]
    return np.stack(rows).astype(np.int64)


def dequantize(linear: GPTQLinear) -> torch.Tensor:
    """The weight [out, in] in float32, from the formula alone."""
    levels = unpack_rows(linear.qweight, linear.bits)
    zeros = unpack_rows(linear.qzeros.t().contiguous(), linear.bits).T + linear.zero_offset
    in_order = np.arange(linear.in_features) // linear.group_size
    group = in_order if linear.g_idx is None else linear.g_idx.numpy()
    scales = linear.scales.float().numpy()
    return torch.from_numpy((scales[group] * (levels - zeros[group]).astype(np.float32)).T.copy())


def by_reference(linear: GPTQLinear) -> torch.Tensor:
    """The same through the op that the model runs."""
    packed = (linear.qweight, linear.qzeros, linear.scales, linear.g_idx)
    return gptq_dequantize(*packed, linear.bits, linear.zero_offset)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_fills_int32_from_the_lowest_bits(bits: int) -> None:
    per_int32 = 32 // bits
    values = torch.zeros(per_int32, 2, dtype=torch.int64)
    values[0, 0], values[1, 0], values[-1, 1] = 1, 2, 2**bits - 1
    packed = pack_rows(values, bits)
    assert packed.dtype is torch.int32 and packed.shape == (1, 2)
    assert packed[0].tolist() == [1 + (2 << bits), -(2 ** (32 - bits))]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 32])
def test_packing_loses_nothing(bits: int, columns: int) -> None:
    values = torch.randint(0, 2**bits, (64, columns), generator=torch.Generator().manual_seed(bits))
    assert np.array_equal(unpack_rows(pack_rows(values, bits), bits), values.numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("in_features", [32, 192, 256])
def test_rounding_is_off_by_half_a_scale_at_most(
    bits: int, group_size: int, sym: bool, zero_offset: int, in_features: int
) -> None:
    weight = random_weight(64, in_features)
    linear = quantize_rtn(weight, bits, group_size, sym, zero_offset=zero_offset)
    assert (linear.in_features, linear.out_features) == (in_features, 64)
    group = torch.arange(in_features) // linear.group_size
    scales = linear.scales.float().t()[:, group]
    # Half a step, and at the ends of the range the rounding of the scale, up to 2^bits steps away from zero.
    allowed = scales * (0.5 + 2**bits * HALF)
    assert ((dequantize(linear) - weight).abs() <= allowed).all()
    assert torch.equal(by_reference(linear), dequantize(linear))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("low_high", [(0.0, 1.0), (0.5, 1.0), (-1.0, 0.0), (-1.0, -0.5), (-0.01, 1.0), (-1.0, 0.01)])
def test_groups_on_one_side_of_zero(sym: bool, zero_offset: int, low_high: tuple[float, float]) -> None:
    low, high = low_high
    weight = torch.linspace(low, high, 32 * 64).view(64, 32)
    linear = quantize_rtn(weight, 4, 32, sym, zero_offset=zero_offset)
    allowed = linear.scales.float().t() * (0.5 + 16 * HALF)
    assert ((dequantize(linear) - weight).abs() <= allowed).all()
    assert linear.scales.max() <= 2 * max(abs(low), abs(high)) / 14 * (1 + HALF)  # and the grid is not a coarse one


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_groups_of_nothing_become_zero(sym: bool, value: float) -> None:
    linear = quantize_rtn(torch.full((8, 32), value), 4, 32, sym)
    assert torch.equal(dequantize(linear), torch.zeros(8, 32))
    assert (linear.scales > 0).all()


def test_symmetric_zero_points_are_the_middle() -> None:
    for bits, word in ((4, 0x77777777), (8, 0x7F7F7F7F)):
        assert (quantize_rtn(random_weight(32, 64), bits, 32, sym=True).qzeros == word).all()


def test_nan_cannot_be_quantized() -> None:
    weight = random_weight(32, 32)
    weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"\(32, 32\).*NaN"):
        quantize_rtn(weight, 4, 32, sym=True)


def record(g_idx: torch.Tensor | None, **quantization: Any) -> GPTQLinear:
    """A linear with 128 inputs and 32 outputs, gathered from a state with this g_idx."""
    config = QuantizationConfig(**{"bits": 4, "group_size": 32, **quantization})
    tensors = quantize_rtn(random_weight(32, 128), config.bits, config.group_size, config.sym).tensors("linear")
    if g_idx is None:
        del tensors["linear.g_idx"]
    else:
        tensors["linear.g_idx"] = g_idx.to(torch.int32)
    return GPTQLinear.from_state(tensors, "linear", config)


@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_in_order_need_no_index(desc_act: bool) -> None:
    linear = record(torch.arange(128) // 32, desc_act=desc_act)
    assert linear.g_idx is None and linear.group_size == 32
    assert (linear.in_features, linear.out_features, linear.zero_offset) == (128, 32, 1)


def test_absent_index_means_in_order() -> None:
    assert record(None).g_idx is None


def test_one_group_for_all_inputs() -> None:
    linear = record(torch.zeros(128), group_size=-1)
    assert linear.g_idx is None and linear.group_size == 128 and linear.scales.shape == (1, 32)


def test_act_order_keeps_its_index() -> None:
    g_idx = (torch.arange(128) // 32)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    linear = record(g_idx, desc_act=True)
    assert linear.g_idx is not None and torch.equal(linear.g_idx.long(), g_idx)
    assert torch.equal(by_reference(linear), dequantize(linear))


def test_a_partial_group_at_the_end_keeps_its_index() -> None:
    """192 inputs are groups of 128 and 64: dividing evenly would make them 96 and 96."""
    made = quantize_rtn(random_weight(32, 192), 4, 128, sym=False)
    tensors = made.tensors("x")
    for state in (tensors, {name: tensor for name, tensor in tensors.items() if name != "x.g_idx"}):
        linear = GPTQLinear.from_state(state, "x", QuantizationConfig(4, 128, sym=False))
        assert linear.g_idx is not None and linear.g_idx.tolist() == [0] * 128 + [1] * 64
        assert torch.equal(by_reference(linear), dequantize(made))


def test_index_out_of_order_without_act_order() -> None:
    with pytest.raises(CheckpointError, match=r"linear\.g_idx is not in order.*desc_act.*i // 32"):
        record(3 - torch.arange(128) // 32)


@pytest.mark.parametrize("stray", [-1, 4])
def test_index_outside_the_groups(stray: int) -> None:
    g_idx = torch.arange(128) // 32
    g_idx[7] = stray
    with pytest.raises(CheckpointError, match=r"linear\.g_idx runs from .*; expected groups 0 to 3"):
        record(g_idx, desc_act=True)


def test_published_tensors_are_restored() -> None:
    bias = random_weight(1, 32)[0].to(torch.float16)
    linear = quantize_rtn(random_weight(32, 192), 4, 128, sym=False, bias=bias)
    tensors = linear.tensors("x")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "x.qweight": (torch.int32, (24, 32)),
        "x.qzeros": (torch.int32, (2, 4)),
        "x.scales": (torch.float16, (2, 32)),
        "x.g_idx": (torch.int32, (192,)),
        "x.bias": (torch.float16, (32,)),
    }
    again = GPTQLinear.from_state(tensors, "x", QuantizationConfig(4, 128, sym=False))
    assert torch.equal(dequantize(again), dequantize(linear))
    assert again.bias is not None and torch.equal(again.bias, bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_state_is_quantized_written_and_loaded(
    raw: dict[str, Any], make_state: Any, write: Any, bits: int, checkpoint_format: str
) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    section = {"bits": bits, "group_size": 64, "sym": False, "checkpoint_format": checkpoint_format}
    raw["quantization_config"] = section
    quantized = ModelConfig.from_dict(raw)
    assert quantized.quantization is not None
    folder = write(raw, quantize_state(state, config, quantized.quantization))
    loaded = load_state(folder, quantized, torch.float32)
    linear = GPTQLinear.from_state(loaded, "transformer.h.1.mlp.c_proj", quantized.quantization)
    weight = state["transformer.h.1.mlp.c_proj.weight"]
    assert ((dequantize(linear) - weight).abs() <= linear.scales.max() * (0.5 + 2**bits * HALF)).all()
    assert linear.bias is not None and not linear.bias.any()  # all five have one in the published files
    assert torch.equal(loaded["transformer.ln_f.weight"], state["transformer.ln_f.weight"].half().float())
    qkv_bias = loaded["transformer.h.0.attn.c_attn.bias"]
    assert torch.equal(qkv_bias, state["transformer.h.0.attn.c_attn.bias"].half().float())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_are_not_rounded(wrong: float, dtype: torch.dtype) -> None:
    weight = torch.full((32, 64), 2.0, dtype=dtype)
    given = weight.clone()
    quantize_rtn(weight, 8, 32, sym=True)
    assert torch.equal(weight, given), "rounded in place"
    weight[1, 40] = wrong
    with pytest.raises(CheckpointError, match=r"shape \(32, 64\) holds NaN or infinity"):
        quantize_rtn(weight, 8, 32, sym=True)
