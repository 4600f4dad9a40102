"""What a conversion makes of a checkpoint: which linears are packed, from what, and which tensors stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.checks import require_choice
from qvl_runtime.config.model import DTYPES, ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from qvl_runtime.formats.host_memory import release
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.weights.manifest import KEEP

if TYPE_CHECKING:
    from torch import Tensor

    from qvl_kernels.reference import Packed

TARGETS = ("cpu", "cuda")
GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")
ROUNDED_GROUP = 128  # inputs that share a scale where floats are rounded to 8 or 4 bits
ROWS_AT_ONCE = 2048  # outputs rounded together, and then given back: 17 MB of the source at 4096 inputs
_POOL = "transformer.visual.attn_pool.attn"
SLICES = (f"{_POOL}.to_k", f"{_POOL}.to_v", "transformer.visual.proj")  # linears that no published name is
_VISION = (".attn.in_proj", ".attn.out_proj", ".mlp.c_fc", ".mlp.c_proj", ".kv_proj")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a conversion is to make."""

    target: str = "cpu"
    dtype: str = "auto"  # of what stays float; auto: what the checkpoint says it should run in
    vision: str = KEEP  # or "int8": the tower's blocks
    head: str = KEEP  # or "int8", "int4"

    def __post_init__(self) -> None:
        require_choice("target", self.target, TARGETS)
        require_choice("dtype", self.dtype, ("auto", *DTYPES))
        require_choice("vision", self.vision, (KEEP, "int8"))
        require_choice("head", self.head, (KEEP, "int8", "int4"))


class Recipe(NamedTuple):
    """One packed linear of the model, or one tensor that stays as it is."""

    name: str
    parts: tuple[str, ...] = ()  # published linears, side by side along the outputs; none: a tensor
    bits: int | None = None  # rounded to these from floats; None: as published


def recipes(config: ModelConfig, options: ConvertOptions) -> Iterator[Recipe]:
    """Everything that the converted checkpoint is to hold, in the order of the published layout."""
    linears = {recipe.parts: recipe for recipe in _linears(config, options)}
    taken = {part: recipe for parts, recipe in linears.items() for part in parts}
    for name in expected_tensors(config):
        prefix, _, kind = name.rpartition(".")
        recipe = taken.get(prefix)
        if recipe is None or (prefix == "transformer.wte" and kind == "weight"):
            yield Recipe(name)
        if recipe is not None and linears.pop(recipe.parts, None) is not None:
            yield recipe
    yield from linears.values()  # those that are slices of a tensor which stays


def _linears(config: ModelConfig, options: ConvertOptions) -> Iterator[Recipe]:
    for i in range(config.num_hidden_layers if config.quantization is not None else 0):
        block = f"transformer.h.{i}"
        yield from (Recipe(name, (name,)) for name in (f"{block}.attn.c_attn", f"{block}.attn.c_proj"))
        yield Recipe(f"{block}.mlp.up_gate", (f"{block}.mlp.w1", f"{block}.mlp.w2"))
        yield Recipe(f"{block}.mlp.c_proj", (f"{block}.mlp.c_proj",))
    if options.vision == "int8":
        for name in expected_tensors(config):
            prefix, _, kind = name.rpartition(".")
            if kind == "weight" and prefix.startswith("transformer.visual.") and prefix.endswith(_VISION):
                yield Recipe(prefix, (prefix,), 8)
        yield from (Recipe(name, (name,), 8) for name in SLICES)
    if options.head != KEEP:
        source = "transformer.wte" if config.tie_word_embeddings else "lm_head"
        yield Recipe("lm_head", (source,), int(options.head.removeprefix("int")))


class Made(NamedTuple):
    """A packed linear, and the published tensors that its layout cannot give back."""

    name: str
    packed: Packed
    parts: tuple[str, ...]
    rounded: bool
    kept: dict[str, Tensor]


def make(recipe: Recipe, tensors: Mapping[str, Tensor], config: ModelConfig, ops: ModuleType) -> Iterator[Made]:
    """Pack a linear; one of two parts that order their inputs differently becomes two."""
    if recipe.bits is not None:
        (part,) = recipe.parts
        packed = _pack(ops, _rounded(tensors, part, recipe.bits))
        if packed.layout == "gptq":  # it would be unpacked on each use, slower than the floats
            raise ConfigError(f"this target has no kernel for {recipe.name} in {recipe.bits} bits: keep its floats")
        yield Made(recipe.name, packed, recipe.parts, True, {})
        return
    if config.quantization is None:
        raise ConfigError(f"{recipe.name} is to be packed as published, and the checkpoint is not quantized")
    linears = [GPTQLinear.from_state(tensors, part, config.quantization) for part in recipe.parts]
    joint = linears[0] if len(linears) == 1 else linears[0].beside(linears[1])
    groups = (
        [(recipe.name, recipe.parts, joint)]
        if joint is not None
        else [(part, (part,), linear) for part, linear in zip(recipe.parts, linears, strict=True)]
    )
    for name, parts, linear in groups:
        stored = (f"{part}.{kind}" for part in parts for kind in GPTQ_TENSORS)
        kept = {full: tensors[full] for full in stored if full in tensors and not full.endswith(".qweight")}
        packed = _pack(ops, linear)
        if packed.layout != "gptq" or len(parts) > 1:  # else these are the words that are still to be written
            for part in parts:
                release(tensors[f"{part}.qweight"])
        yield Made(name, packed, parts, False, kept)


def _slice(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one of `SLICES`, as the model cuts them."""
    if name.endswith(".proj"):
        return tensors[name].t().contiguous(), None
    number = 1 if name.endswith(".to_k") else 2
    weight, bias = (tensors[f"{_POOL}.in_proj_{kind}"].chunk(3)[number] for kind in ("weight", "bias"))
    return weight, bias


def _pack(ops: ModuleType, w: GPTQLinear) -> Packed:
    packed: Packed = ops.pack_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias)
    return packed


def _rounded(tensors: Mapping[str, Tensor], name: str, bits: int) -> GPTQLinear:
    """A dense linear rounded to nearest, some outputs at a time: 8 bits symmetric, 4 bits with zero points."""
    import torch

    weight, bias = _slice(tensors, name) if name in SLICES else (tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
    outputs, inputs = weight.shape
    if outputs % 32:
        raise ConfigError(f"{name} has {outputs} outputs; rounding to {bits} bits takes a multiple of 32: keep it")
    group = ROUNDED_GROUP if inputs >= ROUNDED_GROUP else 32
    qweight = weight.new_empty(inputs * bits // 32, outputs, dtype=torch.int32)
    qzeros, scales, start = [], [], 0
    for rows in torch.split(weight, ROWS_AT_ONCE):
        part = quantize_rtn(rows, bits, group, sym=bits == 8)
        qweight[:, start : start + len(rows)] = part.qweight
        qzeros.append(part.qzeros)
        scales.append(part.scales)
        start += len(rows)
        if name not in SLICES:
            release(rows)
    if name not in SLICES:
        release(weight)  # the pages that two pieces share
    return replace(part, qweight=qweight, qzeros=torch.cat(qzeros, 1), scales=torch.cat(scales, 1), bias=bias)
