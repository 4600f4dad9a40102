"""Load the weights of a checkpoint folder, converted or published, ready for a model to bind."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError, ConfigError, quoted
from qvl_runtime.formats.finite import finite
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.converted import Converted
from qvl_runtime.weights.manifest import Manifest, is_converted
from qvl_runtime.weights.packed_specs import decoder_groups
from qvl_runtime.weights.packing import merge_dense, pack_decoder, source_notes
from qvl_runtime.weights.shares import Share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl_kernels.reference import Packed


EMBEDDING = "transformer.wte.weight"


class Weights(NamedTuple):
    """The weights of a model."""

    state: MutableMapping[str, Tensor]  # dense tensors by published name
    packed: dict[str, Packed]  # linears in the layout of their kernels, by the model's name
    notes: tuple[str, ...] = ()  # where the files were read otherwise than they are labeled


def model_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder; the dtype of a converted one is that of its conversion."""
    config = ModelConfig.from_folder(folder)
    return replace(config, dtype=Manifest.read(folder).dtype) if is_converted(folder) else config


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    embedding_on_host: bool = False,
    share: Share | None = None,
) -> Weights:
    """Load a checkpoint folder, converted or published, in `dtype` on `device`.

    The linears of a quantized decoder are packed on any device. Tensors that already have that dtype and device are
    mapped, not copied. embedding_on_host: the embedding table stays in the host's memory. share: only that part of a
    published checkpoint. Raises `CheckpointError` for a folder that is incomplete, damaged, or converted for another
    device, and `ConfigError` for one that cannot be shared.
    """
    if not is_converted(folder):
        return _published(folder, config, dtype, device, embedding_on_host, share)
    if share is not None:
        raise ConfigError(f"{folder} was converted for one process; tensor_parallel needs the folder it was made from")
    manifest = Manifest.read(folder)
    _check_layouts(folder, manifest, device)
    converted = Converted.open(folder, config, manifest)
    state: dict[str, Tensor] = {}
    for name in manifest.state:
        target = "cpu" if embedding_on_host and name == EMBEDDING else device
        stored = converted.tensor(name)
        state[name] = finite(name, stored.to(target, dtype), stored)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[EMBEDDING]
    packed = {name: converted.linear(name, device) for name in manifest.linears}
    return Weights(state, packed, tuple(manifest.notes))


def _published(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    embedding_on_host: bool,
    share: Share | None,
) -> Weights:
    """A published checkpoint: GPTQ linears are packed one by one, and the pages of each are released."""
    from qvl_kernels import ops_for

    checkpoint = Checkpoint.open(folder, config)
    # Mapped for packing alone: unmapping drops the pages of scales and zero points, 0.14 GB at full size.
    mapped = Checkpoint.open(folder)
    notes = source_notes(mapped, config)
    tensors = mapped if share is None else share.of(mapped)
    packed = pack_decoder(tensors, config, ops_for(device), device)
    del mapped, tensors
    skipped = {part for _, parts in decoder_groups(config) for part in parts} if packed else set()
    on_host = (EMBEDDING,) if embedding_on_host else ()
    if share is not None:
        skipped |= share.unused
    state = checkpoint.load(config, dtype, device, skipped, on_host)
    if share is not None:
        state = {name: share.cut(name, tensor) for name, tensor in state.items()}
    if device.type != "cpu":
        merge_dense(state, config)
    return Weights(state, packed, notes)


def _check_layouts(folder: Path, manifest: Manifest, device: torch.device) -> None:
    from qvl_kernels import ops_for, target_on

    target = target_on(device)
    if manifest.target != target:
        raise CheckpointError(
            f"{folder} was converted for {manifest.target} and cannot run on {target}: convert its source with "
            f"`qvl convert --target {target}`, or run it with device={manifest.target!r}"
        )
    readable = ops_for(device).LAYOUTS
    unknown = sorted({linear.layout for linear in manifest.linears.values()} - set(readable))
    if unknown:
        raise CheckpointError(
            f"{folder} has linears in the layout {quoted(unknown[0])}; the kernels here read "
            f"{', '.join(map(repr, readable))}: convert its source again with this version, or unset QVL_KERNELS"
        )
