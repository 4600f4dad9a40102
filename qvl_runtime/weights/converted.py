"""Open a converted checkpoint: its files, compared with its manifest, and its manifest with the configuration.

A folder may come from a stranger. Whatever reads one comes here, so that sizes and indices are checked before a kernel
gets an address: `load_weights`, `qvl verify`, `qvl convert --to hf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_runtime.config.model import DTYPES, ModelConfig
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.weights.file_names import check_inside
from qvl_runtime.weights.hints import few
from qvl_runtime.weights.manifest import Manifest, PackedLinear
from qvl_runtime.weights.packed_specs import PackedSpec, packed_specs
from qvl_runtime.weights.shards import Shard, open_shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl_kernels.reference import Packed

_AGAIN = "convert the source again"


@dataclass(frozen=True)
class Converted:
    """An open converted checkpoint. Its tensors are mapped files: they must not be written to."""

    folder: Path
    config: ModelConfig
    manifest: Manifest
    shards: dict[str, Shard]  # by file

    @classmethod
    def open(cls, folder: Path, config: ModelConfig | None = None, manifest: Manifest | None = None) -> Converted:
        """Open a folder and check names, shapes and dtypes of all that it holds.

        Raises `CheckpointError` for a file that is missing or damaged, and for one that does not fit config.json.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder) if manifest is None else manifest
        config = ModelConfig.from_folder(folder) if config is None else config
        converted = cls(folder, config, manifest, open_shards(folder, manifest))
        converted._check_linears()
        converted._check_state()
        return converted

    @cached_property
    def shard_of(self) -> dict[str, Shard]:
        """The open file of each tensor."""
        return {name: shard for shard in self.shards.values() for name in shard.infos}

    @cached_property
    def specs(self) -> dict[str, PackedSpec]:
        """What the configuration calls for, by the model's name of the linear."""
        return packed_specs(self.config, self.manifest.vision, self.manifest.head)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self.shard_of[name].tensor(name)

    def linear(self, name: str, device: torch.device | None = None) -> Packed:
        """One packed linear in the layout of its kernel.

        Raises `CheckpointError` where its parts do not fit one another or the configuration.
        """
        from qvl_kernels.any_layout import checked_shape, packed_bits
        from qvl_kernels.reference import Packed

        linear, spec = self.manifest.linears[name], self.specs[name]
        tensors = {kind: self.tensor(full) for kind, full in self._tensors_of(name, linear).items()}
        packed = Packed(linear.layout, tensors, linear.fields)
        try:
            found = (*checked_shape(packed), packed_bits(packed), spec.bias if spec.bias is None else "bias" in tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.folder} has {quoted(name)} damaged: {error}: {_AGAIN}") from None
        if found != (spec.outputs, spec.inputs, spec.bits, spec.bias):
            outputs, inputs, bits, bias = found
            raise CheckpointError(
                f"{self.folder} has {quoted(name)} with {outputs} outputs, {inputs} inputs, {bits} bits"
                f"{'' if bias is None else ' and a bias' if bias else ' and no bias'}; config.json requires "
                f"{spec.outputs}, {spec.inputs} and {spec.bits}: {_AGAIN}"
            )
        return packed if device is None else packed._replace(tensors={k: t.to(device) for k, t in tensors.items()})

    def _tensors_of(self, name: str, linear: PackedLinear) -> dict[str, str]:
        """The stored name of each tensor of a linear."""
        return {kind: f"{name}.{self.manifest.target}.{kind}" for kind in linear.tensors}

    def _check_linears(self) -> None:
        for name, linear in self.manifest.linears.items():
            spec = self.specs.get(name)
            if spec is None or tuple(linear.parts) != spec.parts or linear.rounded != spec.rounded:
                raise CheckpointError(
                    f"{self.folder} packs {quoted(name)} of {quoted(list(linear.parts))}, which config.json does not "
                    f"call for: {_AGAIN}"
                )
            missing = [full for full in self._tensors_of(name, linear).values() if full not in self.shard_of]
            if missing:
                raise CheckpointError(f"{self.folder} lacks the tensors {few(map(quoted, missing))}: {_AGAIN}")

    def _check_state(self) -> None:
        """Every weight of the configuration is packed, or stored as a float in its shape."""
        packed = {part for linear in self.manifest.linears.values() for part in linear.parts}
        expected, state = expected_tensors(self.config), set(self.manifest.state)
        for name, spec in expected.items():
            # The embedding is read although the head may be packed from it.
            absent = spec.optional or (name.rpartition(".")[0] in packed and name != "transformer.wte.weight")
            if absent and name not in state:
                continue
            if name not in state or name not in self.shard_of:
                raise CheckpointError(f"{self.folder} lacks {name}, which config.json requires: {_AGAIN}")
            info = self.shard_of[name].infos[name]
            if info.shape != spec.shape or info.dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.folder} has {name} of shape {info.shape} and dtype {quoted(info.dtype)}; config.json "
                    f"requires {spec.shape} and {' or '.join(DTYPES)}: {_AGAIN}"
                )
        if unknown := sorted(state - expected.keys()):
            raise CheckpointError(f"{self.folder} has {quoted(unknown[0])}, which no model has: {_AGAIN}")


def open_shards(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """Open the files of a converted checkpoint. Raises `CheckpointError` for one that is missing or damaged."""
    shards = {name: open_shard(check_inside(folder, name)) for name in manifest.shards}
    for name, record in manifest.shards.items():
        expected, stored = record.tensors.keys(), shards[name].infos.keys()
        missing, unexpected = expected - stored, stored - expected
        if missing or unexpected:
            raise CheckpointError(
                f"{folder / name} lacks {len(missing)} tensors and has {len(unexpected)} that are not in the manifest "
                f"({few(map(quoted, sorted(missing | unexpected)))}): {_AGAIN}"
            )
    return shards
