"""What a converted checkpoint contains: which linears are packed, from what, and which tensors are stored unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from qvl_kernels.ops import Packer
from qvl_runtime.config.checks import require_choice
from qvl_runtime.config.model import DTYPES, ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.finite import finite
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from qvl_runtime.formats.host_memory import release
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.weights.manifest import KEEP, TARGETS
from qvl_runtime.weights.packed_specs import POOL, SLICES, decoder_groups, packed_specs, rounded_vision
from qvl_runtime.weights.packing import BuiltLinear, build_linears, pack

if TYPE_CHECKING:
    from torch import Tensor

ROUNDED_GROUP = 128  # inputs per scale where floats are rounded to 8 or 4 bits
OUTPUTS_AT_ONCE = 2048  # rounded together, then released: 17 MB of the source at 4096 inputs


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The target and precision of a conversion. Raises `ConfigError` for a value that is not supported."""

    target: str = "cpu"
    dtype: str = "auto"  # of the tensors that stay float; auto: the dtype in config.json
    vision: str = KEEP  # or "int8": the blocks of the vision encoder
    head: str = KEEP  # or "int8", "int4"

    def __post_init__(self) -> None:
        require_choice("target", self.target, TARGETS)
        require_choice("dtype", self.dtype, ("auto", *DTYPES))
        require_choice("vision", self.vision, (KEEP, "int8"))
        require_choice("head", self.head, (KEEP, "int8", "int4"))


class Recipe(NamedTuple):
    """One packed linear of the model, or one tensor that is stored unchanged."""

    name: str
    parts: tuple[str, ...] = ()  # published linears, concatenated along the outputs; empty: a tensor
    bits: int | None = None  # floats are rounded to this many bits; None: GPTQ, as published


def recipes(config: ModelConfig, options: ConvertOptions) -> Iterator[Recipe]:
    """Everything that the converted checkpoint contains, in the order of the published layout."""
    linears = {recipe.parts: recipe for recipe in _linears(config, options)}
    recipe_of = {part: recipe for parts, recipe in linears.items() for part in parts}
    for name in expected_tensors(config):
        prefix, _, kind = name.rpartition(".")
        recipe = recipe_of.get(prefix)
        if recipe is None or (prefix == "transformer.wte" and kind == "weight"):
            yield Recipe(name)
        if recipe is not None and linears.pop(recipe.parts, None) is not None:
            yield recipe
    yield from linears.values()  # slices of a tensor that is stored, too


def _linears(config: ModelConfig, options: ConvertOptions) -> Iterator[Recipe]:
    if config.quantization is not None:
        yield from (Recipe(name, parts) for name, parts in decoder_groups(config))
    if options.vision == "int8":
        yield from (Recipe(name, (name,), 8) for name in rounded_vision(config))
        yield from (Recipe(name, (name,), 8) for name in SLICES)
    if options.head != KEEP:
        source = "transformer.wte" if config.tie_word_embeddings else "lm_head"
        yield Recipe("lm_head", (source,), int(options.head.removeprefix("int")))


def check_roundable(config: ModelConfig, options: ConvertOptions) -> None:
    """Raise `ConfigError` for a linear of a size that cannot be packed once it is rounded."""
    for name, spec in packed_specs(config, options.vision, options.head).items():
        if spec.rounded and spec.outputs % 32:
            raise ConfigError(
                f"{name} has {spec.outputs} outputs; rounding to {spec.bits} bits needs a multiple of 32: keep it"
            )
        if spec.rounded and spec.inputs * spec.bits % 32:
            raise ConfigError(
                f"{name} has {spec.inputs} inputs; rounding to {spec.bits} bits needs a multiple of {32 // spec.bits}: "
                "keep it"
            )


def build(recipe: Recipe, tensors: Mapping[str, Tensor], config: ModelConfig, ops: Packer) -> Iterator[BuiltLinear]:
    """Pack the linear of a recipe; two parts that group their inputs differently become two linears.

    Raises `ConfigError` where the target has no kernel for floats rounded to these bits.
    """
    if recipe.bits is None:
        if config.quantization is None:
            raise ConfigError(f"{recipe.name} cannot be packed as published: the checkpoint is not quantized")
        yield from build_linears(recipe.name, recipe.parts, tensors, config.quantization, ops)
        return
    (part,) = recipe.parts
    packed = pack(ops, _rounded(tensors, part, recipe.bits))
    if packed.layout == "gptq":  # it would be unpacked on each use, slower than the floats
        raise ConfigError(f"this target has no kernel for {recipe.name} in {recipe.bits} bits: keep its floats")
    yield BuiltLinear(recipe.name, packed, recipe.parts)


def _slice(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one of `SLICES`, cut as the model cuts them."""
    if name.endswith(".proj"):
        return tensors[name].t().contiguous(), None
    number = 1 if name.endswith(".to_k") else 2
    weight, bias = (tensors[f"{POOL}.in_proj_{kind}"].chunk(3)[number] for kind in ("weight", "bias"))
    return weight, bias


def _rounded(tensors: Mapping[str, Tensor], name: str, bits: int) -> GPTQLinear:
    """A dense linear rounded to nearest, some outputs at a time: 8 bits symmetric, 4 bits with zero points."""
    import torch

    weight, bias = _slice(tensors, name) if name in SLICES else (tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
    outputs, inputs = weight.shape
    group = ROUNDED_GROUP if inputs >= ROUNDED_GROUP else 32
    qweight = weight.new_empty(inputs * bits // 32, outputs, dtype=torch.int32)
    qzeros, scales, start = [], [], 0
    for rows in torch.split(weight, OUTPUTS_AT_ONCE):
        part = quantize_rtn(finite(name, rows), bits, group, sym=bits == 8)
        qweight[:, start : start + len(rows)] = part.qweight
        qzeros.append(part.qzeros)
        scales.append(part.scales)
        start += len(rows)
        if name not in SLICES:
            release(rows)
    if name not in SLICES:
        release(weight)  # the pages that two pieces share
    return replace(part, qweight=qweight, qzeros=torch.cat(qzeros, 1), scales=torch.cat(scales, 1), bias=bias)
