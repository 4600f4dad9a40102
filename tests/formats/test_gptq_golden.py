"""GPTQ layers as AutoGPTQ packed and dequantized them: the oracle's ten layers and its two corner cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_kernels.reference import gptq_dequantize, gptq_linear, pack_rows
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.weights.checkpoint import load_state

CASES = ("g128_sym", "g64_sym", "gall_sym", "g128_asym", "g64_asym", "gall_asym")
CASES += ("g128_sym_actorder", "g64_asym_actorder", "b8_g128_sym", "b8_g64_asym_actorder")  # type: ignore[assignment]


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "gptq_layers.safetensors")


@pytest.fixture(scope="module")
def settings(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "gptq_layers.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def layer(tensors: dict[str, torch.Tensor], settings: dict[str, Any], case: str) -> GPTQLinear:
    fields = {key: settings[case][key] for key in ("bits", "group_size", "sym", "desc_act")}
    return GPTQLinear.from_state(tensors, case, QuantizationConfig(**fields))


def packed(linear: GPTQLinear) -> tuple[Any, ...]:
    return linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset


@pytest.mark.parametrize("case", CASES)
def test_dequantized_weights(tensors: dict[str, torch.Tensor], settings: dict[str, Any], case: str) -> None:
    linear = layer(tensors, settings, case)
    assert (linear.g_idx is not None) == case.endswith("actorder")
    weight = gptq_dequantize(*packed(linear))
    if f"{case}.dequant_fp32" in tensors:
        torch.testing.assert_close(weight, tensors[f"{case}.dequant_fp32"], atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(weight[::16], tensors[f"{case}.dequant_fp32_every_16th_row"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_outputs(tensors: dict[str, torch.Tensor], settings: dict[str, Any], case: str) -> None:
    linear = layer(tensors, settings, case)
    assert (linear.bias is not None) == settings[case]["bias"]
    bias = None if linear.bias is None else linear.bias.float()
    y = gptq_linear(tensors["x"], *packed(linear), bias)
    torch.testing.assert_close(y, tensors[f"{case}.y"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_zero_points_pack_as_autogptq_packs_them(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any], case: str
) -> None:
    stored = tensors[f"{case}.zeros_out_by_group"] - 1
    assert torch.equal(pack_rows(stored, settings[case]["bits"]).t(), tensors[f"{case}.qzeros"])


def test_rounding_to_nearest_gives_autogptqs_codes(tensors: dict[str, torch.Tensor]) -> None:
    """Its own quantizer made the symmetric layer from this weight: scales, zero points and codes are equal."""
    linear = quantize_rtn(tensors["g128_sym.weight"], bits=4, group_size=128, sym=True)
    for key in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(linear, key), tensors[f"g128_sym.{key}"]), key


def test_stored_15_is_zero_point_16(tensors: dict[str, torch.Tensor]) -> None:
    """Where AutoGPTQ's two modules differ, ours reads as `qlinear_cuda` does; elsewhere they agree."""
    case = {key: tensors[f"zero_corner.{key}"] for key in ("qweight", "qzeros", "scales")}
    weight = gptq_dequantize(**case, g_idx=None, bits=4, zero_offset=1)
    assert torch.equal(weight, tensors["zero_corner.dequant_cuda"])
    assert not torch.equal(weight, tensors["zero_corner.dequant_cuda_old"])


def test_rounding_never_makes_the_zero_point_that_autogptqs_packer_corrupts(tensors: dict[str, torch.Tensor]) -> None:
    """A zero point of 0, stored as -1, sets all bits above it there (`zero0_pack`); a positive group gets 1 here."""
    assert tensors["zero0_pack.qzeros"][0, 0] == 0xFFFFF777 - 2**32
    linear = quantize_rtn(torch.linspace(0.1, 1.0, 32 * 32).view(32, 32), bits=4, group_size=32, sym=False)
    assert (linear.qzeros == 0).all()  # stored zero: zero point 1


def test_every_linear_of_the_int4_checkpoint_is_gathered(golden: Path) -> None:
    folder = golden / "tiny-int4"
    config = ModelConfig.from_folder(folder)
    assert config.quantization is not None
    state = load_state(folder, config, torch.float32)
    for name, (out_features, in_features) in decoder_linears(config).items():
        linear = GPTQLinear.from_state(state, name, config.quantization)
        assert (linear.out_features, linear.in_features, linear.group_size) == (out_features, in_features, 64)
        assert linear.g_idx is None
        assert linear.bias is not None and linear.bias.any()  # not zero there, so that dropping it shows
