"""GPTQ checkpoints of every kind, from a random state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.formats.gptq import quantize_rtn
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.weights.save import quantized_config

LABELED = {"desc_act": False, "quant_method": "gptq"}
GPTQ = {
    "int4": QuantizationConfig(4, 64),
    "int4 asymmetric": QuantizationConfig(4, 64, sym=False),
    "int4 one group": QuantizationConfig(4, -1),
    "int4 act-order": QuantizationConfig(4, 64, desc_act=True),
    "int4 act-order asymmetric": QuantizationConfig(4, 32, desc_act=True, sym=False),
    "int8 v2": QuantizationConfig(8, 32, sym=False, checkpoint_format="gptq_v2"),
}


def quantize_state(
    state: Mapping[str, torch.Tensor], config: ModelConfig, quantization: QuantizationConfig
) -> dict[str, torch.Tensor]:
    """Round the five linears of each block to nearest, in the published layout; all other weights become float16."""
    linears = decoder_linears(config)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        if prefix not in linears:
            packed[name] = tensor.to(torch.float16)
        elif kind == "weight":
            bits, group_size, offset = quantization.bits, quantization.group_size, quantization.zero_offset
            bias = state.get(f"{prefix}.bias")
            linear = quantize_rtn(tensor, bits, group_size, quantization.sym, bias=bias, zero_offset=offset)
            packed |= linear.tensors(prefix)
    return packed


def gptq(raw: dict[str, Any], state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The state rounded as `GPTQ[name]` says; act-order assigns the inputs of each linear to groups at random."""
    kind = GPTQ[name]
    packed = quantize_state(state, ModelConfig.from_dict(raw), kind)
    if kind.desc_act:
        generator = torch.Generator().manual_seed(1)
        for key in [key for key in packed if key.endswith(".g_idx")]:
            packed[key] = packed[key][torch.randperm(len(packed[key]), generator=generator)]
    raw.update(quantized_config(raw, kind))
    return packed


def quantized(
    raw: dict[str, Any], make_state: Any, bits: int = 4, sym: bool = True, stored: str = "gptq"
) -> dict[str, torch.Tensor]:
    """A rounded state; `stored`: the format that its zero points really have."""
    config = ModelConfig.from_dict(raw)
    section = {**LABELED, "bits": bits, "group_size": 64, "sym": sym, "checkpoint_format": stored}
    raw["quantization_config"] = section
    return quantize_state(make_state(config), config, QuantizationConfig.from_dict(section))


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
