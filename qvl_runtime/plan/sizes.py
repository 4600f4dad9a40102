"""Sizes of weights from a configuration alone, in bytes as the kernels hold them."""

from __future__ import annotations

import math

from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.formats.layout import decoder_linears, expected_tensors

GROUP = 128  # inputs per scale where floats are rounded
SCALE = 2  # bytes
IMAGES_AT_ONCE = 8  # more in one pass of the vision encoder cost memory and gain nothing
# Bytes of the encoder's widest activations that several images may have in a CPU's pass. Measured alternately, a
# full-size image took 7.2 and 6.4 s alone, 7.4 and 6.7 in a pass of two, 7.4 in one of four: no gain for the memory.
CPU_ACTIVATIONS = 16 << 20


def weight_bytes(config: ModelConfig, width: int, vision: str = "keep", head: str = "keep") -> dict[str, int]:
    """Bytes of the weights as kernels hold them, by part.

    width: bytes of a float; vision, head: "keep", or the type that they are rounded to.
    """
    parts = {"vision": 0, "language": 0, "embedding": 0, "head": 0}
    linears = decoder_linears(config)
    for name, spec in expected_tensors(config).items():
        size, inputs = math.prod(spec.shape), spec.shape[-1]
        prefix, _, kind = name.rpartition(".")
        if name.startswith("transformer.visual."):
            small = vision == "int8" and len(spec.shape) == 2 and kind in ("weight", "proj", "in_proj_weight")
            if kind in ("in_proj_weight", "in_proj_bias"):
                size -= size // 3  # the resampler's queries are projected once, at load
            parts["vision"] += _rounded(size, inputs, 8) if small else size * width
        elif name == "lm_head.weight":
            parts["head"] += _head(size, inputs, width, head)
        elif name == "transformer.wte.weight":
            parts["embedding"] += size * width
            if config.tie_word_embeddings and head != "keep":
                parts["head"] += _head(size, inputs, width, head)
        else:
            packed = config.quantization is not None and prefix in linears
            parts["language"] += _packed(config, kind, size) if packed else size * width
    return parts


def images_at_once(vision: VisionConfig, width: int, device: str) -> int:
    """Images that the vision encoder computes in one pass, in floats of `width` bytes on a kind of device."""
    if device != "cpu":
        return IMAGES_AT_ONCE
    return min(IMAGES_AT_ONCE, max(1, CPU_ACTIVATIONS // (vision.num_patches * vision.mlp_width * width)))


def _head(size: int, inputs: int, width: int, head: str) -> int:
    return size * width if head == "keep" else _rounded(size, inputs, int(head.removeprefix("int")))


def _rounded(size: int, inputs: int, bits: int) -> int:
    """Codes, a scale for each group of inputs, the last one padded, and for 4 bits a zero point of a byte."""
    group = GROUP if inputs >= GROUP else 32
    groups = size // inputs * cdiv(inputs, group)
    return groups * (group * bits // 8 + SCALE + (bits == 4))


def _packed(config: ModelConfig, kind: str, size: int) -> int:
    """A tensor of a GPTQ linear as kernels hold it: zero points only where they differ, one byte each."""
    kinds = config.quantization
    if kinds is None or kind == "bias" or (kind == "g_idx" and not kinds.desc_act):
        return 0  # a bias is not counted: 0.2 MB of 3.3 GB
    if kind == "qzeros":
        return 0 if kinds.sym else size * (32 // kinds.bits)
    return size * (SCALE if kind == "scales" else 4)
