"""Checkpoints in every layout, and tensors that do not fit the model: a one-line error that names the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.weights.checkpoint import Checkpoint, load_state
from tests.weights.faults import fails

QKV = "transformer.h.0.attn.c_attn"
Fixture = Any
LAYOUTS = [(".safetensors", 1), (".safetensors", 3), (".bin", 1), (".bin", 2)]


@pytest.mark.parametrize(("suffix", "shards"), LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_loads_bit_for_bit(
    raw: dict[str, Any], make_state: Fixture, write: Fixture, suffix: str, shards: int, stored: torch.dtype
) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config, stored)
    folder = write(raw, state, suffix, shards)
    loaded = load_state(folder, config, stored)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype is stored for name in state)
    widened = load_state(folder, config, torch.float32)
    assert all(torch.equal(widened[name], state[name].float()) for name in state)


@pytest.mark.parametrize("name", ["tiny", "tiny-int4"])
def test_oracle_checkpoints_load_as_stored(golden: Path, name: str) -> None:
    config = ModelConfig.from_folder(golden / name)
    stored: dict[str, torch.Tensor] = {}
    for path in (golden / name).glob("*.safetensors"):
        stored |= load_file(path)
    state = load_state(golden / name, config, torch.float32)
    assert state.keys() == stored.keys()
    for key, tensor in stored.items():
        packed = tensor.dtype is torch.int32
        assert state[key].dtype is (torch.int32 if packed else torch.float32)
        assert torch.equal(state[key], tensor if packed else tensor.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_stay_packed(
    raw: dict[str, Any], make_state: Fixture, write: Fixture, bits: int, dtype: torch.dtype
) -> None:
    raw["quantization_config"] = {"bits": bits, "group_size": 64}
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.float16)
    loaded = load_state(write(raw, state), config, dtype)
    for kind in ("qweight", "qzeros", "g_idx"):
        assert torch.equal(loaded[f"{QKV}.{kind}"], state[f"{QKV}.{kind}"])
        assert loaded[f"{QKV}.{kind}"].dtype is torch.int32
    assert loaded[f"{QKV}.bias"].dtype is dtype
    # Scales are rounded to float16 by the quantizer: only float32 holds them exactly too.
    assert loaded[f"{QKV}.scales"].dtype is (torch.float32 if dtype is torch.float32 else torch.float16)
    assert torch.equal(loaded[f"{QKV}.scales"].float(), state[f"{QKV}.scales"].float())


@pytest.mark.parametrize(("suffix", "shards"), LAYOUTS)
def test_weights_of_the_right_dtype_are_the_mapped_file(
    raw: dict[str, Any], make_state: Fixture, write: Fixture, suffix: str, shards: int
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps to see what is mapped")
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config, torch.bfloat16), suffix, shards)
    state = load_state(folder, config, torch.bfloat16)
    regions = []
    for line in maps.read_text().splitlines():
        if str(folder) in line:
            regions.append([int(end, 16) for end in line.split()[0].split("-")])
    copied = [name for name, t in state.items() if not any(low <= t.data_ptr() < high for low, high in regions)]
    assert copied == []


def test_data_at_an_odd_byte_is_copied_to_an_even_one(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.bfloat16)
    path = write(raw, state) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    loaded = load_state(path.parent, config, torch.bfloat16)
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].data_ptr() % 2 == 0 for name in state)


def test_a_lone_file_of_another_name_is_taken(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    torch.save({}, folder / "training_args.bin")
    assert Checkpoint.open(folder, config).file("lm_head.weight") == "gptq_model-4bit-128g.safetensors"


def test_safetensors_are_preferred_to_bin(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config))
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert Checkpoint.open(folder, config).file("lm_head.weight") == "model.safetensors"


def test_tied_embeddings_are_one_tensor(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    raw["tie_word_embeddings"] = True
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    assert "lm_head.weight" not in state
    stale = torch.zeros_like(state["transformer.wte.weight"])
    loaded = load_state(write(raw, {**state, "lm_head.weight": stale}), config, torch.float32)
    assert loaded["lm_head.weight"] is loaded["transformer.wte.weight"]
    assert torch.equal(loaded["lm_head.weight"], state["transformer.wte.weight"])


def test_known_buffers_are_left_out(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    buffers = {"transformer.rotary_emb.inv_freq": torch.ones(32), "transformer.h.0.attn.masked_bias": torch.ones(())}
    loaded = load_state(write(raw, {**make_state(config), **buffers}), config, torch.float32)
    assert not buffers.keys() & loaded.keys()


def test_optional_tensors_may_be_absent(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    raw["quantization_config"] = {"bits": 4, "group_size": 64}
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.float16)
    for name in ("transformer.h.1.mlp.w1.bias", f"{QKV}.g_idx"):
        del state[name]
    assert load_state(write(raw, state), config, torch.float32).keys() == state.keys()


def test_missing_weights_are_counted_and_named(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    for name in [name for name in state if ".h.1." in name]:
        del state[name]
    fails(write(raw, state), config, "lacks 8 of", "transformer.h.1.ln_1.weight", "and 5 more")


def test_unexpected_weights_are_named_with_their_file(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    state = {**make_state(config), "transformer.h.9.ln_1.weight": torch.ones(128)}
    fails(write(raw, state, shards=2), config, "has 1 that", "transformer.h.9.ln_1.weight", "-of-00002.safetensors")


def test_misshapen_weights_are_named_with_both_shapes(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    state[f"{QKV}.weight"] = state[f"{QKV}.weight"][:-1].clone()
    fails(write(raw, state), config, f"has {QKV}.weight of shape (383, 128) in model.safetensors; expected (384, 128)")


def test_other_dtypes_are_named(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].double()
    fails(write(raw, state, ".bin"), config, "transformer.ln_f.weight of dtype float64", "expected float32 or bfloat16")


def test_packed_codes_must_be_int32(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    raw["quantization_config"] = {"bits": 4, "group_size": 64}
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.float16)
    state[f"{QKV}.qweight"] = state[f"{QKV}.qweight"].float()
    fails(write(raw, state), config, f"{QKV}.qweight of dtype float32", "expected int32")


def test_gptq_weights_without_their_config_say_so(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict({**raw, "quantization_config": {"bits": 4, "group_size": 64}})
    folder = write(raw, make_state(config, torch.float16))
    fails(folder, ModelConfig.from_dict(raw), "lacks", "the weights are GPTQ", "quantize_config.json")


def test_float_weights_with_a_gptq_config_say_so(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    folder = write(raw, make_state(ModelConfig.from_dict(raw)))
    quantized = ModelConfig.from_dict({**raw, "quantization_config": {"bits": 4, "group_size": 64}})
    fails(folder, quantized, "the weights are not quantized")


def test_wrong_group_size_is_a_shape_that_does_not_fit(
    raw: dict[str, Any], make_state: Fixture, write: Fixture
) -> None:
    config = ModelConfig.from_dict({**raw, "quantization_config": {"bits": 4, "group_size": 64}})
    folder = write(raw, make_state(config, torch.float16))
    other = ModelConfig.from_dict({**raw, "quantization_config": {"bits": 4, "group_size": 32}})
    fails(folder, other, f"{QKV}.qzeros of shape (2, 48)", "expected (4, 48)")


def test_act_order_needs_g_idx(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    raw["quantization_config"] = {"bits": 4, "group_size": 64, "desc_act": True}
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.float16)
    del state[f"{QKV}.g_idx"]
    fails(write(raw, state), config, "lacks 1 of", f"{QKV}.g_idx")


def test_lora_weights_say_so(raw: dict[str, Any], write: Fixture) -> None:
    state = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 128)}
    fails(write(raw, state), ModelConfig.from_dict(raw), "LoRA", "merge")


def test_open_without_a_config_only_lists(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.names) == {"a", "b"} and "a" in checkpoint and "c" not in checkpoint
    assert checkpoint.info("a") == ((2, 3), "float32") and checkpoint.info("b").dtype == "int32"
    assert torch.equal(checkpoint.tensor("a"), torch.ones(2, 3))
