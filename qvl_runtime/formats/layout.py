"""The tensors that a configuration requires: names and shapes of the published checkpoints (float and GPTQ)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.config.quantization import QuantizationConfig

# Buffers that older savers wrote with the weights; nothing reads them.
_BUFFERS = re.compile(
    r"transformer\.(rotary_emb\.inv_freq|h\.\d+\.attn\.(rotary_emb\.inv_freq|masked_bias|bias|logn_tensor))"
)


class TensorSpec(NamedTuple):
    """The shape and kind of one tensor. packed: int32 codes or indices, never cast; otherwise 16- or 32-bit floats."""

    shape: tuple[int, ...]
    packed: bool = False
    optional: bool = False


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return every tensor of the checkpoint that `config` describes, by published name.

    `lm_head.weight` is absent if it is tied to the embedding.
    """
    hidden, quantization = config.hidden_size, config.quantization
    specs = {"transformer.wte.weight": TensorSpec((config.vocab_size, hidden))}
    for layer in range(config.num_hidden_layers):
        for norm in ("ln_1", "ln_2"):
            specs[f"transformer.h.{layer}.{norm}.weight"] = TensorSpec((hidden,))
    for name, (out_features, in_features) in decoder_linears(config).items():
        has_bias = name.endswith("c_attn") or not config.no_bias
        if quantization is None:
            specs.update(_linear(name, out_features, in_features, has_bias))
        else:
            specs.update(_gptq_linear(name, out_features, in_features, has_bias, quantization))
    specs["transformer.ln_f.weight"] = TensorSpec((hidden,))
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = TensorSpec((config.vocab_size, hidden))
    specs.update((f"transformer.visual.{name}", spec) for name, spec in _vision(config.visual))
    return specs


def decoder_linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the five linears of each decoder block, which GPTQ packs: {prefix: (out_features, in_features)}."""
    hidden, ffn = config.hidden_size, config.ffn_width
    block = {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (ffn, hidden),
        "mlp.w2": (ffn, hidden),
        "mlp.c_proj": (hidden, ffn),
    }
    layers = range(config.num_hidden_layers)
    return {f"transformer.h.{layer}.{name}": shape for layer in layers for name, shape in block.items()}


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor that the model does not use is known and harmless."""
    return bool(_BUFFERS.fullmatch(name)) or (name == "lm_head.weight" and config.tie_word_embeddings)


def _linear(name: str, out_features: int, in_features: int, bias: bool = True) -> dict[str, TensorSpec]:
    specs = {f"{name}.weight": TensorSpec((out_features, in_features))}
    if bias:
        specs[f"{name}.bias"] = TensorSpec((out_features,))
    return specs


def _gptq_linear(
    name: str, out_features: int, in_features: int, bias: bool, quantization: QuantizationConfig
) -> dict[str, TensorSpec]:
    """AutoGPTQ's five tensors. A stored bias is added even if the float model has none."""
    per_int32 = 32 // quantization.bits
    groups = 1 if quantization.group_size == -1 else cdiv(in_features, quantization.group_size)
    return {
        f"{name}.qweight": TensorSpec((in_features // per_int32, out_features), packed=True),
        f"{name}.qzeros": TensorSpec((groups, out_features // per_int32), packed=True),
        f"{name}.scales": TensorSpec((groups, out_features)),
        f"{name}.g_idx": TensorSpec((in_features,), packed=True, optional=not quantization.desc_act),
        f"{name}.bias": TensorSpec((out_features,), optional=not bias),
    }


def _norm(name: str, width: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((width,)), f"{name}.bias": TensorSpec((width,))}


def _vision(vision: VisionConfig) -> Iterator[tuple[str, TensorSpec]]:
    width, mlp, dim, patch = vision.width, vision.mlp_width, vision.output_dim, vision.patch_size
    specs = {
        "conv1.weight": TensorSpec((width, 3, patch, patch)),
        "positional_embedding": TensorSpec((vision.positional_rows, width)),
        "proj": TensorSpec((dim, dim)),
        "attn_pool.query": TensorSpec((vision.n_queries, dim)),
        "attn_pool.pos_embed": TensorSpec((vision.n_queries, dim)),
        "attn_pool.attn.in_proj_weight": TensorSpec((3 * dim, dim)),
        "attn_pool.attn.in_proj_bias": TensorSpec((3 * dim,)),
    }
    specs |= _norm("ln_pre", width) | _norm("ln_post", dim)
    for layer in range(vision.layers):
        block = f"transformer.resblocks.{layer}"
        specs |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        specs |= _linear(f"{block}.attn.in_proj", 3 * width, width) | _linear(f"{block}.attn.out_proj", width, width)
        specs |= _linear(f"{block}.mlp.c_fc", mlp, width) | _linear(f"{block}.mlp.c_proj", width, mlp)
    if width != dim:  # the original has no projection if the widths are equal
        specs |= _linear("attn_pool.kv_proj", dim, width, bias=False)
    specs |= _linear("attn_pool.attn.out_proj", dim, dim)
    specs |= _norm("attn_pool.ln_q", dim) | _norm("attn_pool.ln_kv", dim)
    yield from specs.items()
