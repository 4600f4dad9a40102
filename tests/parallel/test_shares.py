"""What each rank holds of a model: together the whole, and what cannot be split is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.shares import BY_INPUT, BY_OUTPUT, Share
from qvl_runtime.weights.synthetic import synthetic_config

pytestmark = pytest.mark.unit
SHIPPED = Path(__file__).parents[2] / "qvl_runtime"
BLOCK = "transformer.h.1"


def opened(name: str) -> tuple[ModelConfig, Checkpoint]:
    return ModelConfig.from_folder(SHIPPED / name), Checkpoint.open(SHIPPED / name)


def outputs(config: ModelConfig, tensors: Any, part: str, x: torch.Tensor) -> torch.Tensor:
    """What a linear computes of x, from dense or GPTQ tensors, in float64."""
    name = f"{BLOCK}.{part}"
    if config.quantization is None:
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    else:
        linear = GPTQLinear.from_state(tensors, name, config.quantization)
        weight, bias = dequantized(linear), linear.bias
    y: torch.Tensor = x @ weight.double().T
    return y if bias is None else y + bias.double()


def dequantized(linear: GPTQLinear) -> torch.Tensor:
    """[out, in], by the formula of `formats.gptq`, written again for 4 bits."""
    shifts = torch.arange(8) * 4
    codes = ((linear.qweight[:, None, :] >> shifts[:, None]) & 15).flatten(0, 1)
    zeros = ((linear.qzeros[:, :, None] >> shifts) & 15).flatten(1) + linear.zero_offset
    groups = torch.arange(len(codes)) // linear.group_size
    return ((codes - zeros[groups]) * linear.scales.double()[groups]).T


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["nano", "nano_int4"])
def test_the_shares_are_the_whole(name: str, ranks: int) -> None:
    config, tensors = opened(name)
    shares = [Share(config, rank, ranks) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, config.hidden_size, dtype=torch.float64, generator=generator)
    for part in BY_OUTPUT:
        whole = outputs(config, tensors, part, hidden)
        pieces = [outputs(config, share.of(tensors), part, hidden) for share in shares]
        if part == "attn.c_attn":  # q, k and v of each rank's heads
            q, k, v = ([piece.chunk(3, 1)[i] for piece in pieces] for i in range(3))
            pieces = [*q, *k, *v]
        assert torch.equal(torch.cat(pieces, 1), whole), part
    for part, width in zip(BY_INPUT, (config.hidden_size, config.ffn_width), strict=True):
        x = torch.randn(3, width, dtype=torch.float64, generator=generator)
        whole, widths = outputs(config, tensors, part, x), [width // ranks] * ranks
        split = zip(shares, torch.split(x, widths, 1), strict=True)
        total = sum(outputs(config, share.of(tensors), part, own) for share, own in split)
        assert torch.allclose(total, whole, rtol=1e-12, atol=1e-12), part
    rows = torch.cat([share.of(tensors)["lm_head.weight"] for share in shares])
    assert torch.equal(rows, tensors["lm_head.weight"])
    assert sum(shares[0].vocabulary) == config.vocab_size and len(shares[0].vocabulary) == ranks


def test_uneven_widths_are_cut_between_groups() -> None:
    """The published model's 11,008 inputs are 86 groups, which 4 and 8 do not divide."""
    config = synthetic_config("qwen-vl-chat-int4", opened("nano_int4")[0])
    packed = torch.zeros(11008 // 8, 4)
    for ranks, most in ((2, 5504), (4, 2816), (8, 1408)):
        shares = [Share(config, rank, ranks) for rank in range(ranks)]
        sizes = [8 * len(share.cut(f"{BLOCK}.mlp.c_proj.qweight", packed)) for share in shares]
        assert sum(sizes) == 11008 and max(sizes) == most and not any(size % 128 for size in sizes)


def test_what_cannot_be_split() -> None:
    config, tensors = opened("nano_int4")
    with pytest.raises(ConfigError, match=r"tensor_parallel is 3, but 4 heads .* only among 1, 2, 4$"):
        Share(config, 0, 3)
    assert config.quantization is not None
    wide = replace(config, quantization=QuantizationConfig(bits=4, group_size=128, sym=True))
    with pytest.raises(ConfigError, match="1 heads of 64 inputs are no whole groups of 128: use fewer ranks"):
        Share(wide, 0, 4)
    one = Share(replace(config, quantization=replace(config.quantization, group_size=-1)), 0, 2)
    with pytest.raises(ConfigError, match=r"group_size -1"):
        one.cut(f"{BLOCK}.mlp.c_proj.scales", tensors[f"{BLOCK}.mlp.c_proj.scales"])
    with pytest.raises(ConfigError, match=r"c_proj.g_idx permutes its inputs \(act-order\)"):
        Share(config, 0, 2).cut(f"{BLOCK}.mlp.c_proj.g_idx", torch.randperm(512) // 64)
