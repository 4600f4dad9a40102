"""Load the weights of a checkpoint folder, converted or published, ready for a model to bind."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.manifest import Manifest, PackedLinear, is_converted
from qvl_runtime.weights.packing import decoder_groups, merge_dense, pack_decoder, source_notes
from qvl_runtime.weights.shards import Shard, open_shard

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
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, embedding_on_host: bool = False
) -> Weights:
    """Load a checkpoint folder, converted or published, in `dtype` on `device`.

    The linears of a quantized decoder are packed on any device. Tensors that already have that dtype and device are
    mapped, not copied. embedding_on_host: the embedding table stays in the host's memory. Raises `CheckpointError` for
    a folder that is incomplete, damaged, or converted for another device.
    """
    if not is_converted(folder):
        return _published(folder, config, dtype, device, embedding_on_host)
    manifest = Manifest.read(folder)
    _check_layouts(folder, manifest, device)
    shards = open_shards(folder, manifest)
    _check_complete(folder, manifest, shards, config)
    shard_of = {name: shard for shard in shards.values() for name in shard.infos}
    state: dict[str, Tensor] = {}
    for name in manifest.state:
        tensor = shard_of[name].tensor(name)
        target = "cpu" if embedding_on_host and name == EMBEDDING else device
        state[name] = tensor.to(target, dtype if tensor.is_floating_point() else tensor.dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[EMBEDDING]
    linears = manifest.linears.items()
    packed = {name: packed_linear(name, linear, manifest, shard_of, device) for name, linear in linears}
    return Weights(state, packed, tuple(manifest.notes))


def _published(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, embedding_on_host: bool
) -> Weights:
    """A published checkpoint: GPTQ linears are packed one by one, and the pages of each are released."""
    from qvl_kernels import ops_for

    checkpoint = Checkpoint.open(folder, config)
    # Mapped for packing alone: unmapping drops the pages of scales and zero points, 0.14 GB at full size.
    mapped = Checkpoint.open(folder)
    notes = source_notes(mapped, config)
    packed = pack_decoder(mapped, config, ops_for(device), device)
    del mapped
    skipped = {part for _, parts in decoder_groups(config) for part in parts} if packed else ()
    on_host = (EMBEDDING,) if embedding_on_host else ()
    state = checkpoint.load(config, dtype, device, skipped, on_host)
    if device.type != "cpu":
        merge_dense(state, config)
    return Weights(state, packed, notes)


def packed_linear(
    name: str, linear: PackedLinear, manifest: Manifest, shard_of: dict[str, Shard], device: torch.device | None = None
) -> Packed:
    """One linear of a converted checkpoint in the layout of its kernel."""
    from qvl_kernels.reference import Packed

    names = {kind: f"{name}.{manifest.target}.{kind}" for kind in linear.tensors}
    tensors = {kind: shard_of[full].tensor(full).to(device) for kind, full in names.items()}
    return Packed(linear.layout, tensors, linear.fields)


def open_shards(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """Open the files of a converted checkpoint. Raises `CheckpointError` for one that is missing or damaged."""
    shards = {name: open_shard(folder / name) for name in manifest.shards}
    for name, record in manifest.shards.items():
        expected, stored = record.tensors.keys(), shards[name].infos.keys()
        missing, unexpected = expected - stored, stored - expected
        if missing or unexpected:
            raise CheckpointError(
                f"{folder / name} lacks {len(missing)} tensors and has {len(unexpected)} that are not in the manifest "
                f"({', '.join(sorted(missing | unexpected)[:3])}): convert the source again"
            )
    return shards


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
            f"{folder} has linears in the layout {unknown[0]!r}; the kernels here read "
            f"{', '.join(map(repr, readable))}: convert its source again with this version, or unset QVL_KERNELS"
        )


def _check_complete(folder: Path, manifest: Manifest, shards: dict[str, Shard], config: ModelConfig) -> None:
    """Raise `CheckpointError` unless every weight of the configuration is stored, in its shape or packed."""
    infos = {name: info for shard in shards.values() for name, info in shard.infos.items()}
    packed_parts = {part for linear in manifest.linears.values() for part in linear.parts}
    for name, spec in expected_tensors(config).items():
        if name.rpartition(".")[0] in packed_parts or (spec.optional and name not in infos):
            continue
        if name not in infos or name not in manifest.state:
            raise CheckpointError(f"{folder} lacks {name}, which config.json requires: convert the source again")
        if infos[name].shape != spec.shape:
            raise CheckpointError(
                f"{folder} has {name} of shape {infos[name].shape}; config.json requires {spec.shape}"
            )
    tensors = [
        f"{name}.{manifest.target}.{kind}" for name, linear in manifest.linears.items() for kind in linear.tensors
    ]
    missing = [name for name in tensors if name not in infos]
    if missing:
        names = ", ".join(missing[:3])
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors ({names}): convert the source again")
