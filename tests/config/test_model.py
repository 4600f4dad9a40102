"""Configuration files: the released ones are read to the letter, and what is not supported is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import ConfigError

# The settings of the released Qwen-VL-Chat, as its config.json has them.
RELEASED: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
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
    "vocab_size": 151936,
}
GPTQ: dict[str, Any] = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}


def changed(**changes: Any) -> dict[str, Any]:
    """The released config with some keys set (`visual__x` inside `visual`), or dropped where the value is `...`."""
    raw = copy.deepcopy(RELEASED)
    for key, value in changes.items():
        section = raw["visual"] if key.startswith("visual__") else raw
        name = key.removeprefix("visual__")
        if value is ...:
            del section[name]
        else:
            section[name] = value
    return raw


def test_released_config_is_read_to_the_letter() -> None:
    config = ModelConfig.from_dict(RELEASED)
    assert dataclasses.asdict(config) == {
        **{field.name: RELEASED.get(field.name) for field in dataclasses.fields(ModelConfig)},
        "visual": {
            **RELEASED["visual"],
            "n_queries": 256,
            "pool_head_dim": 128,
            "positional_rows": 256,
            "layer_norm_eps": 1e-6,
        },
        "dtype": "bfloat16",
        "quantization": None,
    }
    assert (config.ffn_width, config.rotary_dim, config.context_limit) == (11008, 128, 8192)


def test_released_vision_sizes() -> None:
    vision = ModelConfig.from_dict(RELEASED).visual
    assert (vision.grid, vision.num_patches, vision.mlp_width) == (32, 1024, 8192)
    assert (vision.head_dim, vision.pool_heads, vision.span) == (104, 32, 258)
    assert (vision.image_end_id, vision.image_pad_id) == (151858, 151859)


def test_mlp_width_is_truncated_not_rounded() -> None:
    vision = VisionConfig(168, 7, 96, 2, 4, 4.9231, 256, 1238)  # 472.6
    assert vision.mlp_width == 472


@pytest.mark.parametrize("name", ["tiny", "tiny-int4"])
def test_golden_checkpoints(golden: Path, name: str) -> None:
    config = ModelConfig.from_folder(golden / name)
    assert (config.hidden_size, config.num_attention_heads, config.kv_channels, config.seq_length) == (256, 4, 64, 64)
    assert (config.visual.grid, config.visual.pool_heads, config.visual.image_start_id) == (24, 2, 1238)
    expected = QuantizationConfig(bits=4, group_size=64) if name == "tiny-int4" else None
    assert config.quantization == expected
    defaults = GenerationDefaults.from_folder(golden / name)
    assert (defaults.chat_format, defaults.eos_token_id, defaults.top_p, defaults.top_k) == ("chatml", 1024, 0.5, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
            ["qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen-VL-Chat"],
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["'llama'", "LlamaForCausalLM"]),
        ({"architectures": ["QWenForSequenceClassification"]}, ["QWenForSequenceClassification"]),
        ({"visual": ...}, ["'visual'", "text-only", "Qwen-7B"]),
        ({"visual": ..., "audio": {}}, ["'visual'", "Qwen-Audio"]),
        ({"visual": 3}, ["visual 3", "object"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, ["rope_parameters", "yarn"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads", "8"]),
        ({"seq_length": ...}, ["'seq_length'"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'", "int"]),
        ({"no_bias": 1}, ["no_bias", "1", "bool"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True", "int"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "positive"]),
        ({"layer_norm_epsilon": float("nan")}, ["layer_norm_epsilon", "nan"]),
        ({"kv_channels": 64}, ["hidden_size is 4096", "32 * 64 = 2048"]),
        ({"intermediate_size": 22017}, ["intermediate_size", "22017"]),
        ({"rotary_pct": 0.0}, ["rotary_pct", "0.0"]),
        ({"rotary_pct": 1.5}, ["rotary_pct", "1.5"]),
        ({"rotary_pct": 0.26}, ["rotary_pct", "33 of 128"]),
        ({"seq_length": 1}, ["seq_length is 1"]),
        ({"vocab_size": 32000}, ["image_start_id", "151857", "vocab_size is 32000"]),
        ({"vocab_size": 151859}, ["image_start_id", "vocab_size is 151859"]),
        ({"visual__output_dim": 2048}, ["visual.output_dim is 2048", "4096"]),
        ({"visual__output_dim": 4100}, ["visual.output_dim is 4100", "128"]),
        ({"visual__n_queries": 200}, ["visual.n_queries is 200", "square"]),
        ({"visual__positional_rows": 255}, ["visual.positional_rows is 255", "square"]),
        ({"visual__heads": 15}, ["visual.width is 1664", "15"]),
        ({"visual__patch_size": 15}, ["visual.image_size is 448", "15"]),
        ({"visual__width": ...}, ["'width'", "visual"]),
        ({"visual__mlp_ratio": "big"}, ["mlp_ratio", "'big'", "float"]),
        ({"fp16": True}, ["bf16 and fp16"]),
        ({"bf16": False, "torch_dtype": "float64"}, ["torch_dtype", "float64"]),
    ],
)
def test_unsupported_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(changed(**changes))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "awq"}, ["quant_method", "'awq'"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
        ({"bits": 2}, ["bits is 2", "4, 8"]),
        ({"bits": 3}, ["bits is 3", "4, 8"]),
        ({"bits": ...}, ["'bits'"]),
        ({"group_size": ...}, ["'group_size'"]),
        ({"group_size": 256}, ["group_size is 256", "32, 64, 128, -1"]),
        ({"group_size": 0}, ["group_size is 0"]),
        ({"checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
        ({"is_marlin_format": True}, ["is_marlin_format"]),
        ({"lm_head": True}, ["lm_head"]),
        ({"desc_act": "yes"}, ["desc_act", "'yes'"]),
    ],
)
def test_unsupported_quantization_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    section = {key: value for key, value in {**GPTQ, **changes}.items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(changed(quantization_config=section))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_quantized_sizes_must_fill_whole_words() -> None:
    with pytest.raises(ConfigError, match=r"intermediate_size / 2 is 11000.*32"):
        ModelConfig.from_dict(changed(intermediate_size=22000, quantization_config=GPTQ))


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_supported_quantization(bits: int, group_size: int) -> None:
    section = {**GPTQ, "bits": bits, "group_size": group_size, "desc_act": True, "sym": False}
    config = ModelConfig.from_dict(changed(quantization_config=section))
    assert config.quantization == QuantizationConfig(bits, group_size, desc_act=True, sym=False)


@pytest.mark.parametrize(("name", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_zero_points_of_both_formats(name: str, offset: int) -> None:
    assert QuantizationConfig.from_dict({**GPTQ, "checkpoint_format": name}).zero_offset == offset


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"fp16": True, "bf16": False}, "float16"),
        ({"fp32": True, "bf16": False, "torch_dtype": "float16"}, "float32"),
        ({"bf16": False, "torch_dtype": "float16"}, "float16"),
        ({"bf16": False, "torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"bf16": False, "torch_dtype": ...}, "float32"),
    ],
)
def test_dtype_is_the_flag_then_torch_dtype(flags: dict[str, Any], dtype: str) -> None:
    assert ModelConfig.from_dict(changed(**flags)).dtype == dtype


def test_settings_that_the_original_hard_codes_come_from_the_file() -> None:
    changes = {"n_queries": 64, "pool_head_dim": 64, "positional_rows": 64, "layer_norm_eps": 1e-5}
    vision = ModelConfig.from_dict(changed(**{f"visual__{key}": value for key, value in changes.items()})).visual
    assert (vision.n_queries, vision.span, vision.pool_heads) == (64, 66, 64)
    assert (vision.positional_rows, vision.layer_norm_eps) == (64, 1e-5)


def test_partial_rotation_biases_and_tying_are_supported() -> None:
    config = ModelConfig.from_dict(changed(rotary_pct=0.25, no_bias=False, tie_word_embeddings=True))
    assert (config.rotary_dim, config.no_bias, config.tie_word_embeddings) == (32, False, True)


def test_absent_keys_take_the_original_classes_defaults() -> None:
    optional = ("kv_channels", "layer_norm_epsilon", "rotary_emb_base", "rotary_pct", "use_dynamic_ntk")
    optional += ("use_logn_attn", "max_position_embeddings", "no_bias", "tie_word_embeddings")  # type: ignore[assignment]
    assert ModelConfig.from_dict(changed(**dict.fromkeys(optional, ...))) == ModelConfig.from_dict(RELEASED)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_quantize_config_serves_where_config_has_no_section(tmp_path: Path) -> None:
    folder = write(tmp_path, config=RELEASED, quantize_config={**GPTQ, "group_size": 64, "quant_method": None})
    quantization = ModelConfig.from_folder(folder).quantization
    assert quantization is not None and quantization.group_size == 64
    write(tmp_path, config={**RELEASED, "quantization_config": {**GPTQ, "group_size": 32}})
    quantization = ModelConfig.from_folder(folder).quantization
    assert quantization is not None and quantization.group_size == 32


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_folder(tmp_path)
    write(tmp_path, adapter_config={})
    with pytest.raises(ConfigError, match=r"LoRA adapter.*merge"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe\x00", b"version https://git-lfs", b"[1]", b""])
def test_broken_json_names_the_file_on_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        ModelConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_configs_cannot_be_changed() -> None:
    config = ModelConfig.from_dict(RELEASED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


def test_reading_a_config_loads_no_heavy_library() -> None:
    code = "import sys, qvl_runtime.config.model, qvl_runtime.weights.checkpoint, qvl_runtime.weights.hub; "
    code += "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
