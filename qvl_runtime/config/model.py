"""The configuration of a checkpoint: its JSON files as frozen dataclasses that validate themselves.

`ModelConfig` comes from `config.json`, and from `quantize_config.json` if the former has no `quantization_config`. Keys
without effect on the forward pass (`initializer_range`, `use_flash_attn`, `onnx_safe`, …) are ignored; a key that
changes it and is not implemented raises `ConfigError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import (
    read_fields,
    read_json,
    require_at_most,
    require_choice,
    require_divides,
    require_object,
    require_positive,
)
from qvl_runtime.config.model_limits import MOST, MOST_DOUBLINGS, MOST_VISUAL
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.reading.regular_files import is_there

DTYPES = ("float32", "bfloat16", "float16")
_DTYPE_FLAGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MODEL_TYPES = ("qwen", "qwen_vl")  # the second, and vLLM's name of the class, are of other runtimes for this model
_ARCHITECTURES = ("QWenLMHeadModel", "QwenVLForConditionalGeneration")
_RUNS = "qvl_runtime runs Qwen-VL, Qwen-VL-Chat and Qwen-VL-Chat-Int4 (model_type 'qwen', QWenLMHeadModel)"


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision encoder and its resampler; the last four fields are constants of the original code."""

    image_size: int  # pixels a side
    patch_size: int  # pixels a side
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int  # must equal hidden_size: the outputs overwrite hidden states
    image_start_id: int  # `<img>`; `</img>` and `<imgpad>` follow it
    n_queries: int = 256  # tokens per image
    pool_head_dim: int = 128
    positional_rows: int = 256  # a square table, resized to the grid at run time
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(self, "visual.", *(f.name for f in fields(self)))
        require_at_most(self, "visual.", MOST_VISUAL)
        if not self.mlp_width:
            raise ConfigError(f"visual.mlp_ratio is {self.mlp_ratio}; expected one that leaves the MLP a channel")
        require_divides("visual.image_size", self.image_size, "visual.patch_size", self.patch_size)
        require_divides("visual.width", self.width, "visual.heads", self.heads)
        require_divides("visual.output_dim", self.output_dim, "the resampler's head size", self.pool_head_dim)
        for name in ("n_queries", "positional_rows"):
            value = getattr(self, name)
            if math.isqrt(value) ** 2 != value:
                raise ConfigError(f"visual.{name} is {value}; expected a square number, such as 256 (a 16 x 16 grid)")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def mlp_width(self) -> int:
        """The width of the MLP, int(width * mlp_ratio): truncated, not rounded (4.9231 * 1664 is 8192.04)."""
        return int(self.width * self.mlp_ratio)

    @property
    def head_dim(self) -> int:
        """Channels of a head of the ViT."""
        return self.width // self.heads

    @property
    def pool_heads(self) -> int:
        """Heads of the resampler."""
        return self.output_dim // self.pool_head_dim

    @property
    def image_end_id(self) -> int:
        """The token id of `</img>`."""
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        """The token id of `<imgpad>`."""
        return self.image_start_id + 2

    @property
    def span(self) -> int:
        """Tokens of an image in a prompt, its start and end id included."""
        return self.n_queries + 2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model, named as in the published `config.json`; defaults are those of the original config class."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # as in the file: twice the width of the MLP
    vocab_size: int
    seq_length: int  # training length, beyond which NTK and log-n apply
    visual: VisionConfig
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    max_position_embeddings: int = 8192
    no_bias: bool = True  # of c_proj, w1, w2 and mlp.c_proj; c_attn always has one
    tie_word_embeddings: bool = False  # true: lm_head.weight is wte.weight
    dtype: str = "float32"  # the dtype that the checkpoint asks for
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        require_positive(self, "", "vocab_size", "seq_length", "kv_channels", "max_position_embeddings")
        require_positive(self, "", "layer_norm_epsilon", "rotary_emb_base")
        require_at_most(self, "", MOST)
        heads, channels = self.num_attention_heads, self.kv_channels
        if self.hidden_size != heads * channels:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}; expected num_attention_heads * kv_channels = "
                f"{heads} * {channels} = {heads * channels}"
            )
        require_divides("intermediate_size", self.intermediate_size, "its two halves", 2)
        if self.visual.output_dim != self.hidden_size:
            raise ConfigError(
                f"visual.output_dim is {self.visual.output_dim}; expected hidden_size = {self.hidden_size}, "
                "since image features replace hidden states"
            )
        if self.visual.image_pad_id >= self.vocab_size:
            raise ConfigError(
                f"visual.image_start_id is {self.visual.image_start_id} and needs two ids after it; "
                f"vocab_size is {self.vocab_size}: the two come from different models"
            )
        if not 0.0 < self.rotary_pct <= 1.0:
            raise ConfigError(f"rotary_pct is {self.rotary_pct}; expected a fraction in (0, 1]")
        if self.rotary_dim < 4 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_pct is {self.rotary_pct} and rotates {self.rotary_dim} of {channels} channels; "
                "expected an even number of at least 4 rotated channels"
            )
        if self.seq_length < 2:
            raise ConfigError(f"seq_length is {self.seq_length}; expected at least 2 (log-n divides by its logarithm)")
        if self.use_dynamic_ntk and self.max_position_embeddings > self.seq_length << MOST_DOUBLINGS:
            raise ConfigError(
                f"max_position_embeddings is {self.max_position_embeddings} and seq_length {self.seq_length}; expected "
                f"a context of up to {1 << MOST_DOUBLINGS:,} training lengths"
            )
        require_choice("dtype", self.dtype, DTYPES)
        if self.quantization is not None:  # AutoGPTQ packs rows and columns by 32
            require_divides("hidden_size", self.hidden_size, "GPTQ's packing", 32)
            require_divides("intermediate_size / 2", self.ffn_width, "GPTQ's packing", 32)

    @property
    def ffn_width(self) -> int:
        """The width of the MLP: half of `intermediate_size`."""
        return self.intermediate_size // 2

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary embedding rotates."""
        return int(self.kv_channels * self.rotary_pct)

    @property
    def context_limit(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], quantize: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a `config.json`, with the content of `quantize_config.json` if the folder has one.

        Raises `ConfigError` for another architecture, a missing or mistyped key and an unsupported value.
        """
        _check_supported(raw)
        where, section = "config.json", raw.get("quantization_config")
        if section is not None:
            require_object(section, "quantization_config")
        quantization = QuantizationConfig.from_files(section, quantize)
        values = read_fields(cls, raw, where, skip=("visual", "dtype", "quantization"))
        visual = require_object(raw["visual"], "visual")
        vision = VisionConfig(**read_fields(VisionConfig, visual, f"{where}, section visual,"))
        return cls(**values, visual=vision, dtype=_read_dtype(raw), quantization=quantization)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` and, if it exists, `quantize_config.json` of a checkpoint folder."""
        folder = Path(folder)
        if not is_there(folder / "config.json") and (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{folder} holds a LoRA adapter, not a model: merge it into its base with `qvl merge`")
        quantize = folder / "quantize_config.json"
        return cls.from_dict(read_json(folder / "config.json"), read_json(quantize) if is_there(quantize) else None)


def _check_supported(raw: Mapping[str, Any]) -> None:
    model_type, architectures = raw.get("model_type") or "qwen", raw.get("architectures") or ["QWenLMHeadModel"]
    known = isinstance(architectures, list) and all(name in _ARCHITECTURES for name in architectures)
    if model_type not in _MODEL_TYPES or not known:
        names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures
        raise ConfigError(f"config.json describes model_type {model_type!r} ({names}), which is another model; {_RUNS}")
    if raw.get("visual") is None:
        other = "Qwen-Audio" if "audio" in raw else "a text-only Qwen such as Qwen-7B"
        raise ConfigError(f"config.json has no 'visual' section, so it looks like {other}; {_RUNS}")
    if raw.get("rope_scaling"):
        raise ConfigError(f"config.json sets rope_scaling to {raw['rope_scaling']}; supported is use_dynamic_ntk alone")
    rope = raw.get("rope_parameters")  # transformers 5 writes the default one
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json has rope_parameters {quoted(rope)}; supported is use_dynamic_ntk alone")
    groups = raw.get("num_key_value_heads")
    if groups is not None and groups != raw.get("num_attention_heads"):
        raise ConfigError(f"config.json has num_key_value_heads {groups}; supported is one for each query head")


def _read_dtype(raw: Mapping[str, Any]) -> str:
    """Return one of the three flags, else `torch_dtype`, else float32 (the original would query the GPU)."""
    flags = [name for name in _DTYPE_FLAGS if raw.get(name)]
    if len(flags) > 1:
        raise ConfigError(f"config.json sets {' and '.join(flags)}; expected at most one of fp32, bf16 and fp16")
    if flags:
        return _DTYPE_FLAGS[flags[0]]
    named = str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch.")
    require_choice("torch_dtype", named, DTYPES)
    return named
