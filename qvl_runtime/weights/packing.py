"""Packed linears of a GPTQ checkpoint in the layout of a device's kernels: the only place that builds them.

Loading, conversion and synthetic models all come here, so a linear is packed and merged the same way on every device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qvl_kernels.ops import Packer
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.formats.finite import finite
from qvl_runtime.formats.gptq import GPTQ_TENSORS, GPTQLinear
from qvl_runtime.formats.host_memory import release
from qvl_runtime.formats.zero_points import zero_point_notes
from qvl_runtime.weights.packed_specs import decoder_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl_kernels.reference import Packed
    from qvl_runtime.weights.checkpoint import Checkpoint


SAMPLED_ROWS = 64  # of the vocabulary, compared where a head is stored twice
_log = logging.getLogger("qvl_runtime")


class BuiltLinear(NamedTuple):
    """A packed linear, by the name that the model has for it."""

    name: str
    packed: Packed
    parts: tuple[str, ...]  # the published linears merged in it, one after another along the outputs


def source_notes(checkpoint: Checkpoint, config: ModelConfig) -> tuple[str, ...]:
    """Where a published checkpoint is read otherwise than its names and labels say, or looks wrong; each is logged.

    Raises `CheckpointError` for zero points that contradict the configuration.
    """
    notes = [*checkpoint.notes, *_tied_head_note(checkpoint, config), *zero_point_notes(checkpoint, config)]
    for note in notes:
        _log.warning("%s", note)
    return tuple(notes)


def _tied_head_note(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """A head that is stored although the configuration ties it to the embedding, and is another matrix."""
    import torch

    head, embedding = "lm_head.weight", "transformer.wte.weight"
    if not config.tie_word_embeddings or head not in checkpoint:
        return []
    rows = torch.linspace(0, config.vocab_size - 1, SAMPLED_ROWS).long()
    stored, used = checkpoint.tensor(head), checkpoint.tensor(embedding)
    if stored.shape == used.shape and torch.equal(stored[rows].float(), used[rows].float()):
        return []
    return [
        "config.json has tie_word_embeddings true, and the checkpoint has an lm_head.weight that differs from the "
        "embedding: it is not used; set the key to false if the head was trained"
    ]


def build_linears(
    name: str,
    parts: Sequence[str],
    tensors: Mapping[str, Tensor],
    quantization: QuantizationConfig,
    ops: Packer,
    device: torch.device | None = None,
) -> Iterator[BuiltLinear]:
    """Pack the published linears `parts` as one linear `name`, or each alone where they group inputs differently.

    tensors: the checkpoint, which may be mapped; pages of a file that the result does not hold are released.
    device: where to pack; None: where the tensors are.
    """
    published = [GPTQLinear.from_state(tensors, part, quantization) for part in parts]
    for part, linear in zip(parts, published, strict=True):
        finite(f"{part}.scales", linear.scales.half(), linear.scales, always=True)  # kernels have them in float16
        if linear.bias is not None:
            finite(f"{part}.bias", linear.bias)
    linears = published if device is None else [linear.to(device) for linear in published]
    merged = linears[0] if len(linears) == 1 else linears[0].concat_outputs(linears[1])
    groups: list[tuple[str, tuple[str, ...], GPTQLinear]]
    if merged is None:
        groups = [(part, (part,), linear) for part, linear in zip(parts, linears, strict=True)]
    else:
        groups = [(name, tuple(parts), merged)]
    for group_name, group_parts, linear in groups:
        packed = pack(ops, linear)
        for part, source in zip(parts, published, strict=True):
            # A layout that keeps qweight as published still reads the file.
            if part in group_parts and packed.tensors.get("qweight") is not source.qweight:
                release(source.qweight)
        yield BuiltLinear(group_name, packed, group_parts)


def pack(ops: Packer, linear: GPTQLinear) -> Packed:
    """A GPTQ linear in the layout of `ops`, or as published where that layout cannot hold it."""
    packed: Packed = ops.pack_gptq(
        linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset, linear.bias
    )
    return packed


def pack_decoder(
    tensors: Mapping[str, Tensor], config: ModelConfig, ops: Packer, device: torch.device | None = None
) -> dict[str, Packed]:
    """Every packed linear of a quantized decoder, by the model's name; empty where the checkpoint is dense.

    A `tensors` that can be changed loses what was packed, so that memory holds one linear twice at most.
    """
    packed: dict[str, Packed] = {}
    if config.quantization is None:
        return packed
    for name, parts in decoder_groups(config):
        for built in build_linears(name, parts, tensors, config.quantization, ops, device):
            packed[built.name] = built.packed
        if isinstance(tensors, MutableMapping):
            for part in parts:
                for kind in GPTQ_TENSORS:
                    tensors.pop(f"{part}.{kind}", None)
    return packed


def merge_dense(state: MutableMapping[str, Tensor], config: ModelConfig) -> None:
    """Merge dense linears that the model has as one, layer by layer.

    For GPUs only: on a CPU dense weights are pages of a mapped file, and a merged copy would be resident memory.
    """
    import torch

    for name, parts in decoder_groups(config) if config.quantization is None else ():
        for kind in ("weight", "bias") if len(parts) > 1 else ():
            if f"{parts[0]}.{kind}" in state:
                state[f"{name}.{kind}"] = torch.cat([state.pop(f"{part}.{kind}") for part in parts])
