"""Weights as a model takes them: of a converted checkpoint as its files lie, of a published one as it says."""

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
from qvl_runtime.weights.packing import decoder_groups, merge_dense, pack_decoder
from qvl_runtime.weights.shards import Shard, open_shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl_kernels.reference import Packed


EMBEDDING = "transformer.wte.weight"


class Weights(NamedTuple):
    """What a model is made of."""

    state: MutableMapping[str, Tensor]  # by published name
    packed: dict[str, Packed]  # linears in their kernels' layout, by the name that the model gives them


def model_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder; a converted one runs in the dtype it was converted to."""
    config = ModelConfig.from_folder(folder)
    return replace(config, dtype=Manifest.read(folder).dtype) if is_converted(folder) else config


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, embedding_on_host: bool = False
) -> Weights:
    """The weights of a checkpoint folder, converted or not, mapped where they are what `dtype` and `device` ask for.

    embedding_on_host: the embedding table stays in the host's memory, whatever the device.
    Raises `CheckpointError` for a converted folder that lacks something, is damaged, or is meant for another device.
    """
    if not is_converted(folder):
        return _published(folder, config, dtype, device, embedding_on_host)
    manifest = Manifest.read(folder)
    _refuse_layouts(folder, manifest, device)
    shards = open_shards(folder, manifest)
    _check(folder, manifest, shards, config)
    where = {name: shard for shard in shards.values() for name in shard.infos}
    state: dict[str, Tensor] = {}
    for name in manifest.state:
        tensor = where[name].tensor(name)
        place = "cpu" if embedding_on_host and name == EMBEDDING else device
        state[name] = tensor.to(place, dtype if tensor.is_floating_point() else tensor.dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[EMBEDDING]
    linears = manifest.linears.items()
    return Weights(state, {name: packed_linear(name, linear, manifest, where, device) for name, linear in linears})


def _published(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, embedding_on_host: bool
) -> Weights:
    """A published checkpoint: GPTQ linears are packed one by one, and the pages of each are released."""
    from qvl_kernels import ops_for

    checkpoint = Checkpoint.open(folder, config)
    packed = pack_decoder(checkpoint, config, ops_for(device), device)
    skipped = {part for _, parts in decoder_groups(config) for part in parts} if packed else ()
    on_host = (EMBEDDING,) if embedding_on_host else ()
    state = checkpoint.load(config, dtype, device, skipped, on_host)
    if device.type != "cpu":
        merge_dense(state, config)
    return Weights(state, packed)


def packed_linear(
    name: str, linear: PackedLinear, manifest: Manifest, where: dict[str, Shard], device: torch.device | None = None
) -> Packed:
    """One linear of a converted checkpoint, as its kernel takes it."""
    from qvl_kernels.reference import Packed

    found = {kind: f"{name}.{manifest.target}.{kind}" for kind in linear.tensors}
    tensors = {kind: where[full].tensor(full).to(device) for kind, full in found.items()}
    return Packed(linear.layout, tensors, linear.fields)


def open_shards(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """The files of a converted checkpoint; raises `CheckpointError` for one that is missing, damaged or another's."""
    shards = {name: open_shard(folder / name) for name in manifest.shards}
    for name, record in manifest.shards.items():
        known, found = record.tensors.keys(), shards[name].infos.keys()
        lacks, more = known - found, found - known
        if lacks or more:
            raise CheckpointError(
                f"{folder / name} lacks {len(lacks)} tensors and has {len(more)} that the manifest does not know "
                f"({', '.join(sorted(lacks | more)[:3])}): convert the source anew"
            )
    return shards


def _refuse_layouts(folder: Path, manifest: Manifest, device: torch.device) -> None:
    from qvl_kernels import ops_for, target_on

    target = target_on(device)
    if manifest.target != target:
        raise CheckpointError(
            f"{folder} is laid out for {manifest.target} and is to run on {target}: convert its source with "
            f"--target {target}, or run it with --device {manifest.target}"
        )
    readable = ops_for(device).LAYOUTS
    strange = sorted({linear.layout for linear in manifest.linears.values()} - set(readable))
    if strange:
        reads = ", ".join(map(repr, readable))
        raise CheckpointError(
            f"{folder} has linears in the layout {strange[0]!r}; what runs here reads {reads}: "
            "convert its source anew with this version, or leave QVL_KERNELS out"
        )


def _check(folder: Path, manifest: Manifest, shards: dict[str, Shard], config: ModelConfig) -> None:
    """Every weight that the configuration calls for is there, in its shape, as it is or inside a packed linear."""
    infos = {name: info for shard in shards.values() for name, info in shard.infos.items()}
    inside = {part for linear in manifest.linears.values() for part in linear.parts}
    for name, spec in expected_tensors(config).items():
        if name.rpartition(".")[0] in inside or (spec.optional and name not in infos):
            continue
        if name not in infos or name not in manifest.state:
            raise CheckpointError(f"{folder} lacks {name}, which config.json calls for: convert the source anew")
        if infos[name].shape != spec.shape:
            raise CheckpointError(f"{folder} has {name} of shape {infos[name].shape}; config.json says {spec.shape}")
    lost = [f"{name}.{manifest.target}.{kind}" for name, linear in manifest.linears.items() for kind in linear.tensors]
    lost = [name for name in lost if name not in infos]
    if lost:
        raise CheckpointError(f"{folder} lacks {len(lost)} tensors ({', '.join(lost[:3])}): convert the source anew")
