"""Settings of a GPTQ configuration against shapes, indices and names of its tensors, and in the spellings of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.weights.loader import load_weights
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import quantized
from tests.weights.faults import fails

CPU = torch.device("cpu")
QKV = "transformer.h.1.attn.c_attn"


@pytest.mark.parametrize("group", [0, 1])
def test_g_idx_must_fill_its_groups(raw: dict[str, Any], make_state: MakeState, write: Write, group: int) -> None:
    """An index that was never written is zero everywhere: one group of all inputs, while there are scales for two."""
    state = quantized(raw, make_state)
    raw["quantization_config"]["desc_act"] = True
    state[f"{QKV}.g_idx"] = torch.full((128,), group, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=rf"{QKV}\.g_idx gives group 0 {128 * (1 - group)} inputs; expected 64"):
        load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)


def test_g_idx_of_64_bits(raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path) -> None:
    state = quantized(raw, make_state)
    right = load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)
    (tmp_path / "model").rename(tmp_path / "narrow")
    wide = {name: tensor.long() if name.endswith("g_idx") else tensor for name, tensor in state.items()}
    found = load_weights(write(raw, wide), ModelConfig.from_dict(raw), torch.float32, CPU)
    for name, packed in right.packed.items():
        assert all(torch.equal(tensor, found.packed[name].tensors[kind]) for kind, tensor in packed.tensors.items())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ({"bits": 8}, "of 4 bits in groups of 64 inputs, and the configuration says 8 bits in groups of 64"),
        ({"group_size": 32}, "of 4 bits in groups of 64 inputs, and the configuration says 4 bits in groups of 32"),
        ({"bits": 8, "group_size": -1}, "says 8 bits in groups of -1"),
    ],
)
def test_shapes_tell_bits_and_groups(
    raw: dict[str, Any], make_state: MakeState, write: Write, label: dict[str, int], words: str
) -> None:
    state = quantized(raw, make_state)
    raw["quantization_config"] |= label
    fails(write(raw, state), ModelConfig.from_dict(raw), words)


@pytest.mark.parametrize("dynamic", [{"-:.*visual.*": {}}, {"-:lm_head": {}}, {"+:.*c_attn": {"bits": 4}}, {}, None])
def test_rules_that_change_nothing_are_accepted(  # vllm#25029
    raw: dict[str, Any], make_state: MakeState, write: Write, dynamic: Any
) -> None:
    state = quantized(raw, make_state)
    raw["quantization_config"]["dynamic"] = dynamic
    load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)


def test_rules_that_change_a_packed_linear_are_refused_by_name(
    raw: dict[str, Any], make_state: MakeState, write: Write
) -> None:
    state = quantized(raw, make_state)
    fresh = json.loads(json.dumps(raw))
    del fresh["quantization_config"]
    state |= {name: t for name, t in quantized(fresh, make_state, 8).items() if name.startswith(QKV)}
    raw["quantization_config"]["dynamic"] = {r"+:.*\.1\.attn\.c_attn": {"bits": 8}}
    folder = write(raw, state)
    fails(folder, ModelConfig.from_dict(raw), f"{QKV}.qweight of shape", "'dynamic'")


def test_linears_that_a_rule_left_out_are_named(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    dense = make_state(ModelConfig.from_dict(raw))
    state = quantized(raw, make_state)
    for kind in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        del state[f"{QKV}.{kind}"]
    state |= {f"{QKV}.{kind}": dense[f"{QKV}.{kind}"] for kind in ("weight", "bias")}
    raw["quantization_config"]["dynamic"] = {f"-:{QKV}": {}}
    fails(write(raw, state), ModelConfig.from_dict(raw), f"{QKV}.qweight", "'dynamic'")


@pytest.mark.parametrize(
    "section",
    [
        {"bits": "4", "group_size": "64", "quant_method": "GPTQ", "sym": "true", "desc_act": "False"},
        {"bits": 4.0, "group_size": 64, "checkpoint_format": "GPTQ", "sym": True},
        {"bits": 4, "group_size": 64, "method": "gptq", "format": "gptq", "sym": True, "lm_head": "false"},
    ],
)
def test_other_spellings_of_the_same(section: dict[str, Any]) -> None:  # vllm#25029
    assert QuantizationConfig.from_dict(section) == QuantizationConfig(4, 64)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"bits": "four"}, ["bits", "'four'"]),
        ({"format": "gptq_p"}, ["'gptq_p'", "gptq_v2"]),  # GPTQModel's planar layout
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, ["'gptq'", "'gptq_v2'", "correct the wrong one"]),
        ({"method": "awq"}, ["quant_method", "'awq'"]),
        ({"rotation": "hadamard"}, ["'rotation'"]),
    ],
)
def test_other_formats_are_refused_by_name(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_dict({"bits": 4, "group_size": 64, **section})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_format_is_read_under_both_names() -> None:
    assert QuantizationConfig.from_dict({"bits": 4, "group_size": 64, "format": "gptq_v2"}).zero_offset == 0


def test_packed_integers_of_other_widths_say_what_to_do(
    raw: dict[str, Any], make_state: MakeState, write: Write
) -> None:
    state = quantized(raw, make_state)
    state[f"{QKV}.qweight"] = state[f"{QKV}.qweight"].to(torch.int64)
    fails(write(raw, state), ModelConfig.from_dict(raw), f"{QKV}.qweight of dtype int64", "pack_dtype")
