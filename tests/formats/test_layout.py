"""The table of expected tensors, against the sizes of the published checkpoints and the oracle's files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import decoder_linears, expected_tensors, is_ignored

RELEASED: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "seq_length": 2048,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def test_released_float_model_has_its_number_of_parameters() -> None:
    specs = expected_tensors(ModelConfig.from_dict(RELEASED))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == 9_656_935_168
    visual = (spec for name, spec in specs.items() if name.startswith("transformer.visual."))
    assert sum(math.prod(spec.shape) for spec in visual) == 1_935_610_624


def test_released_int4_model_has_its_tensors_and_bytes() -> None:
    """1461 tensors and `metadata.total_size` of the published index."""
    quantization = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq"}
    specs = expected_tensors(ModelConfig.from_dict({**RELEASED, "quantization_config": quantization}))
    assert len(specs) == 1461
    assert sum(math.prod(spec.shape) * (4 if spec.packed else 2) for spec in specs.values()) == 9_731_786_240
    mlp = {name.rpartition(".")[2]: spec.shape for name, spec in specs.items() if ".h.31.mlp.c_proj." in name}
    shapes = {"qweight": (1376, 4096), "qzeros": (86, 512), "scales": (86, 4096), "g_idx": (11008,), "bias": (4096,)}
    assert mlp == shapes


def test_biases_follow_no_bias(raw: dict[str, Any]) -> None:
    without = expected_tensors(ModelConfig.from_dict(raw)).keys()
    added = expected_tensors(ModelConfig.from_dict({**raw, "no_bias": False})).keys() - without
    linears = ("attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert added == {f"transformer.h.{layer}.{name}.bias" for layer in range(2) for name in linears}


def test_kv_proj_is_left_out_where_widths_agree(raw: dict[str, Any]) -> None:
    name = "transformer.visual.attn_pool.kv_proj.weight"
    assert expected_tensors(ModelConfig.from_dict(raw))[name].shape == (128, 32)
    raw["visual"]["width"] = 128
    assert name not in expected_tensors(ModelConfig.from_dict(raw))


@pytest.mark.parametrize(("group_size", "groups"), [(32, 6), (64, 3), (128, 2), (-1, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_shapes(raw: dict[str, Any], bits: int, group_size: int, groups: int) -> None:
    raw["quantization_config"] = {"bits": bits, "group_size": group_size}
    specs = expected_tensors(ModelConfig.from_dict(raw))
    prefix = "transformer.h.1.mlp.c_proj"  # 192 inputs, 128 outputs
    assert specs[f"{prefix}.qweight"].shape == (192 * bits // 32, 128)
    assert specs[f"{prefix}.qzeros"].shape == (groups, 128 * bits // 32)
    assert specs[f"{prefix}.scales"].shape == (groups, 128)
    assert not specs[f"{prefix}.scales"].packed and specs[f"{prefix}.qweight"].packed


def test_what_gptq_may_leave_out(raw: dict[str, Any]) -> None:
    """Biases that the float model lacks, and g_idx where groups are in order."""
    optional = {}
    for desc_act in (False, True):
        raw["quantization_config"] = {"bits": 4, "group_size": 64, "desc_act": desc_act}
        specs = expected_tensors(ModelConfig.from_dict(raw))
        names = (name for name, spec in specs.items() if spec.optional and ".h.0." in name)
        optional[desc_act] = {name.removeprefix("transformer.h.0.") for name in names}
    linears = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert optional[True] == {f"{name}.bias" for name in linears[1:]}
    assert optional[False] == optional[True] | {f"{name}.g_idx" for name in linears}


def test_linears_of_the_decoder(raw: dict[str, Any]) -> None:
    linears = decoder_linears(ModelConfig.from_dict(raw))
    assert len(linears) == 10
    assert linears["transformer.h.1.attn.c_attn"] == (384, 128)
    assert linears["transformer.h.0.mlp.c_proj"] == (128, 192)


def test_only_known_buffers_are_ignored(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    for name in ("rotary_emb.inv_freq", "h.0.attn.rotary_emb.inv_freq", "h.11.attn.masked_bias", "h.1.attn.bias"):
        assert is_ignored(f"transformer.{name}", config)
    for name in ("transformer.h.0.attn.c_proj.bias", "transformer.visual.attn_pool.attn.bias", "lm_head.weight"):
        assert not is_ignored(name, config)
    assert is_ignored("lm_head.weight", ModelConfig.from_dict({**raw, "tie_word_embeddings": True}))


@pytest.mark.parametrize("name", ["tiny", "tiny-int4"])
def test_oracle_checkpoints_hold_exactly_these(golden: Path, name: str) -> None:
    from safetensors import safe_open

    stored: dict[str, Any] = {}
    for path in (golden / name).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    specs = expected_tensors(ModelConfig.from_dict(json.loads((golden / name / "config.json").read_text())))
    assert stored == {key: spec.shape for key, spec in specs.items()}
