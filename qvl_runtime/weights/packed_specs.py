"""The linears that a converted checkpoint packs: what a configuration calls for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import decoder_linears, expected_tensors

POOL = "transformer.visual.attn_pool.attn"
SLICES = (f"{POOL}.to_k", f"{POOL}.to_v", "transformer.visual.proj")  # linears without a published name
VISION = (".attn.in_proj", ".attn.out_proj", ".mlp.c_fc", ".mlp.c_proj", ".kv_proj")


class PackedSpec(NamedTuple):
    """One packed linear, by the name that the model has for it."""

    parts: tuple[str, ...]  # the published linears merged in it
    outputs: int
    inputs: int
    bits: int
    bias: bool | None  # None: with or without one
    rounded: bool  # from floats; else packed as published


def decoder_groups(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The linears of the decoder as the model has them: (name, published linears), in published order.

    w1 and w2 have the same input and are merged into one linear, `up_gate`.
    """
    for layer in range(config.num_hidden_layers):
        block = f"transformer.h.{layer}"
        for name in (f"{block}.attn.c_attn", f"{block}.attn.c_proj"):
            yield name, (name,)
        yield f"{block}.mlp.up_gate", (f"{block}.mlp.w1", f"{block}.mlp.w2")
        yield f"{block}.mlp.c_proj", (f"{block}.mlp.c_proj",)


def rounded_vision(config: ModelConfig) -> Iterator[str]:
    """The linears of the vision encoder that a conversion can round, in published order; `SLICES` come after them."""
    for name in expected_tensors(config):
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and prefix.startswith("transformer.visual.") and prefix.endswith(VISION):
            yield prefix


def packed_specs(config: ModelConfig, vision: str, head: str) -> dict[str, PackedSpec]:
    """Every linear that a converted checkpoint of this configuration may pack, by the model's name.

    vision, head: "keep", or the type that they were rounded to. Linears that could not be merged are there alone as
    well: a checkpoint has one or the other.
    """
    specs = {}
    if config.quantization is not None:
        shapes = decoder_linears(config)
        groups = list(decoder_groups(config))
        alone = [(part, (part,)) for _, merged in groups if len(merged) > 1 for part in merged]
        for name, parts in [*groups, *alone]:
            outputs, (_, inputs) = sum(shapes[part][0] for part in parts), shapes[parts[0]]
            bias = True if name.endswith("c_attn") or not config.no_bias else None
            specs[name] = PackedSpec(parts, outputs, inputs, config.quantization.bits, bias, False)
    if vision == "int8":
        expected, dim = expected_tensors(config), config.visual.output_dim
        for name in rounded_vision(config):
            outputs, inputs = expected[f"{name}.weight"].shape
            specs[name] = PackedSpec((name,), outputs, inputs, 8, f"{name}.bias" in expected, True)
        for name in SLICES:
            specs[name] = PackedSpec((name,), dim, dim, 8, name.startswith(POOL), True)
    if head != "keep":
        source = "transformer.wte" if config.tie_word_embeddings else "lm_head"
        bits = int(head.removeprefix("int"))
        specs["lm_head"] = PackedSpec((source,), config.vocab_size, config.hidden_size, bits, False, True)
    return specs
