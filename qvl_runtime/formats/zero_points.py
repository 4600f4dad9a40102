"""What the zero points of a GPTQ checkpoint say about its format, whatever its label says.

The two formats differ by one: v1 stores zero points minus one, v2 as they are. The true zero point of a symmetric
linear is the middle of its codes, 8 of 4 bits and 128 of 8, so the stored value tells the format. Some writers label it
wrongly (GPTQModel 5 wrote 8 under "gptq"; Optimum 2.3 calls v1 "gptq_v2" in config.json), and a model read with the
wrong one answers noise.

The zero points of an asymmetric linear can be anything. Its codes tell, though: weights are as often positive as
negative, so codes lie as often above their zero point as below, and with the wrong format they are all off by one. That
is evidence where there are two labels, and a warning where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import FORMATS, QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.layout import decoder_linears

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_ROWS = 8  # of packed codes of a linear: 88,000 codes or more at full size
_FORMAT_OF = {1: FORMATS[0], 0: FORMATS[1]}  # by what is added to a stored zero point
_NEAR = 0.25  # codes: how far the mean of the sampled ones may lie from their zero points


def resolve_offset(tensors: Mapping[str, Tensor], name: str, quantization: QuantizationConfig) -> int:
    """What to add to the stored zero points of linear `name`: by the data if it is symmetric, else by the label.

    Where the configuration does not say whether the checkpoint is symmetric, one value in the whole linear makes it so;
    where two files disagree on the format, the codes tell. Raises `CheckpointError` for a symmetric checkpoint with
    other zero points, and for codes that tell nothing.
    """
    qzeros, label = tensors[f"{name}.qzeros"], quantization.checkpoint_format
    for offset in _FORMAT_OF if quantization.sym is not False else ():
        if bool((qzeros == _word(_middle(quantization) - offset, quantization.bits)).all()):
            return offset
    if quantization.sym:
        raise CheckpointError(_neither(name, qzeros, quantization))
    if label is not None:
        return quantization.zero_offset
    mean = _mean_code(tensors, name, quantization)
    for offset in _FORMAT_OF:
        if abs(mean - offset) <= _NEAR:
            return offset
    raise CheckpointError(
        "config.json and quantize_config.json have different values of checkpoint_format, and the codes do not tell "
        f"which is right ({name}: {mean:+.2f} from the stored zero points on average): correct one of the two"
    )


def zero_point_notes(tensors: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Look at the zero points of a whole checkpoint: what is read otherwise than labeled, or looks wrong.

    Raises `CheckpointError` as `resolve_offset` does. Reads a hundredth of the packed weights.
    """
    quantization = config.quantization
    if quantization is None:
        return []
    names, label = list(decoder_linears(config)), quantization.checkpoint_format
    offsets = {name: resolve_offset(tensors, name, quantization) for name in names}
    if label is None:
        found = ", ".join(sorted({repr(_FORMAT_OF[offset]) for offset in offsets.values()}))
        return [f"config.json and quantize_config.json disagree on the checkpoint_format; the data is {found}"]
    if other := [name for name in names if _FORMAT_OF[offsets[name]] != label]:
        stored, real = _middle(quantization) - offsets[other[0]], _FORMAT_OF[offsets[other[0]]]
        return [
            f"the zero points of {len(other)} of {len(names)} symmetric linears are stored as {stored}, which is the "
            f"format {real!r} and not {label!r}, as the configuration says: read as stored"
        ]
    if quantization.sym:
        return []
    mean = sum(_mean_code(tensors, name, quantization) for name in names) / len(names)
    wrong = 1 - quantization.zero_offset
    if abs(mean - wrong) > _NEAR:
        return []
    return [
        f"the codes lie {mean - quantization.zero_offset:+.2f} from their zero points on average, as if the "
        f"checkpoint_format were {_FORMAT_OF[wrong]!r} and not {label!r}: change it in the quantization config if the "
        "answers are noise"
    ]


def _mean_code(tensors: Mapping[str, Tensor], name: str, quantization: QuantizationConfig) -> float:
    """The mean of code minus stored zero point over some rows of a linear: about 1 in format v1, 0 in v2."""
    import torch

    from qvl_kernels.reference import unpack_rows

    qweight, bits = tensors[f"{name}.qweight"], quantization.bits
    zeros = unpack_rows(tensors[f"{name}.qzeros"].t(), bits).t()
    per_row, inputs = 32 // bits, len(qweight) * (32 // bits)
    rows = torch.arange(0, len(qweight), max(1, len(qweight) // SAMPLED_ROWS))[:SAMPLED_ROWS]
    index = (rows[:, None] * per_row + torch.arange(per_row)).flatten()
    g_idx = tensors.get(f"{name}.g_idx")
    size = inputs if quantization.group_size == -1 else quantization.group_size
    groups = index // size if g_idx is None else g_idx[index].long().clamp(0, len(zeros) - 1)
    return float((unpack_rows(qweight[rows], bits) - zeros[groups]).float().mean())


def _neither(name: str, qzeros: Tensor, quantization: QuantizationConfig) -> str:
    """The message for a linear that no symmetric format has, with the first stored value that is in neither."""
    from qvl_kernels.reference import unpack_rows

    zeros = unpack_rows(qzeros.t(), quantization.bits).t()
    middle = _middle(quantization)
    strays = ((zeros != middle) & (zeros != middle - 1)).nonzero()
    if len(strays):
        group, output = strays[0].tolist()
        found = f"{int(zeros[group, output])} for group {group} of output {output}"
    else:
        found = f"both {middle - 1} and {middle}"
    return (
        f"{name}.qzeros holds {found}; a symmetric checkpoint of {quantization.bits} bits has {middle - 1} everywhere "
        f"(format 'gptq') or {middle} (format 'gptq_v2'): set sym to false if it was quantized so, or fetch it again"
    )


def _middle(quantization: QuantizationConfig) -> int:
    return 1 << (quantization.bits - 1)


def _word(value: int, bits: int) -> int:
    """An int32 of fields that all hold `value`."""
    word = sum(value << shift for shift in range(0, 32, bits))
    return word - (1 << 32) if word >> 31 else word
