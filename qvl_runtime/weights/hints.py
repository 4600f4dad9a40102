"""The likely cause of tensors that do not fit a configuration, as the end of an error message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import GROUP_SIZES, QuantizationConfig
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.weights.names import common_prefix_hint

if TYPE_CHECKING:
    from qvl_runtime.weights.tensor_info import TensorInfo

_GPTQ_INTEGERS = (".qweight", ".qzeros")


def misfit_hint(
    infos: Mapping[str, TensorInfo], missing: Sequence[str], unexpected: Sequence[str], config: ModelConfig
) -> str:
    """The cause that the names, shapes and dtypes of the tensors establish; empty where they establish none."""
    quantization = config.quantization
    if any(".lora_" in name for name in unexpected):
        return ": these are LoRA weights, so merge the adapter into its base model first"
    if hint := common_prefix_hint(unexpected):
        return hint
    if missing == ["lm_head.weight"]:
        return ": these are the weights of the model without its head, so save those of the whole model"
    if quantization is None:
        gptq = any(name.endswith(".qweight") for name in unexpected)
        way_out = ": the weights are GPTQ, so its config needs a quantization_config or quantize_config.json"
        return way_out if gptq else ""
    linears = decoder_linears(config)
    packed = [name for name in linears if f"{name}.qweight" in infos]
    if not packed:
        dense = any(f"{name}.weight" in infos for name in linears)
        return ": the weights are not quantized, so config.json must not have a quantization_config" if dense else ""
    if len(packed) < len(linears) and any(f"{name}.weight" in infos for name in linears):
        return _some_otherwise(f"only {len(packed)} of {len(linears)} linears are packed", quantization)
    if any(_dtype(infos, name + kind) not in ("int32", "") for name in packed for kind in _GPTQ_INTEGERS):
        return ": the codes must be packed in int32 words, so quantize or repack the model with pack_dtype int32"
    return _grid_hint(infos, {name: linears[name][1] for name in packed}, quantization)


def _grid_hint(infos: Mapping[str, TensorInfo], inputs: Mapping[str, int], quantization: QuantizationConfig) -> str:
    """What bits and group size the shapes of the packed linears tell."""
    found = {name: _grid(infos, name, size) for name, size in inputs.items()}
    labeled = {name: (quantization.bits, cdiv(size, quantization.group_size)) for name, size in inputs.items()}
    labeled = {name: (bits, max(1, groups)) for name, (bits, groups) in labeled.items()}  # -1: one group
    others = [name for name in inputs if found[name] != labeled[name]]
    if not others:
        return ""
    sizes = [size for size in GROUP_SIZES if all(found[n][1] == max(1, cdiv(inputs[n], size)) for n in inputs)]
    widths = {bits for bits, _ in found.values()}
    if len(widths) == 1 and sizes:
        (bits,) = widths
        return (
            f": the packed shapes are those of {bits} bits in groups of {sizes[0]} inputs, and the configuration says "
            f"{quantization.bits} bits in groups of {quantization.group_size}: correct it"
        )
    return _some_otherwise(f"{len(others)} of {len(inputs)} linears have other bits or groups", quantization)


def _some_otherwise(found: str, quantization: QuantizationConfig) -> str:
    cause = ", which the 'dynamic' rules of the quantization config ask for" if quantization.dynamic else ""
    return f": {found}{cause}; supported is one setting for all: quantize the float model again with it"


def _grid(infos: Mapping[str, TensorInfo], name: str, inputs: int) -> tuple[int, int]:
    """The bits of a packed linear and its number of groups, from its shapes; 0 where there are none."""
    qweight, scales = infos.get(f"{name}.qweight"), infos.get(f"{name}.scales")
    words = qweight.shape[0] if qweight is not None and qweight.shape else 0
    groups = scales.shape[0] if scales is not None and scales.shape else 0
    return words * 32 // inputs, groups


def _dtype(infos: Mapping[str, TensorInfo], name: str) -> str:
    return infos[name].dtype if name in infos else ""


def few(names: Iterable[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + rest
