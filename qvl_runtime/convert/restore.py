"""Restore the published checkpoint from a converted one: the same files, byte for byte, checked by their SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_kernels.ops import Packer
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.formats.host_memory import pieces, release
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.regular_files import is_there
from qvl_runtime.weights.converted import Converted
from qvl_runtime.weights.file_names import check_inside, check_names
from qvl_runtime.weights.files import copy_file
from qvl_runtime.weights.manifest import MANIFEST, Manifest, SourceFile, file_digest
from qvl_runtime.weights.partial import check_destination, write_folder
from qvl_runtime.weights.records import check_once
from qvl_runtime.weights.tensor_file import CODES, LENGTH, TensorFile, Written, memory, read_entries

if TYPE_CHECKING:
    from torch import Tensor


class Restored(NamedTuple):
    """The restored weight files."""

    exact: list[str]  # files with the SHA-256 of the source's
    tensors_only: list[str]  # files with the source's tensors, which it had in another format


def restore(source: Path, destination: Path, progress: Callable[[int], None] = lambda done: None) -> Restored:
    """Write the checkpoint that `source` was converted from as the folder `destination`, which appears when complete.

    progress: called with the number of bytes written. Raises `CheckpointError` where the conversion rounded weights,
    for a file that differs from the source's, and for a destination that exists or is being written.
    """
    from qvl_kernels import packing_for

    source, destination = Path(source), Path(destination)
    check_destination(source, destination)
    manifest = Manifest.read(source)
    if manifest.rounded:
        raise CheckpointError(
            f"{source} holds {len(manifest.rounded)} weights that were rounded ({', '.join(manifest.rounded[:3])}), so "
            "the published ones cannot be restored: keep the source"
        )

    converted = Converted.open(source, manifest=manifest)
    entries = _entries(source, manifest)

    def write(folder: Path) -> None:
        reader, done = _Reader(converted, packing_for(manifest.target)), 0
        for name, file in manifest.sources.items():
            done += _write(folder / file.restored_as, file, entries[name], reader)
            progress(done)
        _small_files(source, folder, manifest)

    write_folder(destination, "qvl convert --to hf", write)
    files = manifest.sources.values()
    return Restored([f.restored_as for f in files if f.exact], [f.restored_as for f in files if not f.exact])


class _Reader:
    """The published tensors of a converted checkpoint."""

    def __init__(self, converted: Converted, ops: Packer) -> None:
        self._converted, self._ops = converted, ops
        self._linears = {part: name for name, linear in converted.manifest.linears.items() for part in linear.parts}
        self._latest: tuple[str, Tensor] | None = None  # a linear that may have another part

    def tensor(self, name: str, dtype: str) -> Iterator[Tensor]:
        """A tensor as `dtype`, in pieces."""
        import torch

        if name in self._converted.shard_of:
            return pieces(self._converted.tensor(name), getattr(torch, dtype))
        prefix, _, kind = name.rpartition(".")
        if kind != "qweight" or prefix not in self._linears:
            raise CheckpointError(f"the converted checkpoint lacks {quoted(name)}: convert the source again")
        return iter([self._qweight(prefix)])

    def _qweight(self, part: str) -> Tensor:
        name = self._linears[part]
        if self._latest is None or self._latest[0] != name:
            packed = self._converted.linear(name)
            self._latest = name, self._ops.unpack_to_qweight(packed)
            for tensor in packed.tensors.values():
                release(tensor)
        linear = self._converted.manifest.linears[name]
        parts = self._latest[1].chunk(len(linear.parts), dim=1)  # of equal width
        return parts[linear.parts.index(part)].contiguous()


def _entries(source: Path, manifest: Manifest) -> dict[str, dict[str, Written]]:
    """The tensors of each published file. Raises `CheckpointError` for one that is in two of them."""
    where = f"{source / MANIFEST}, sources,"
    entries = {name: read_entries(file.header, f"{where} {name}") for name, file in manifest.sources.items()}
    check_once((name for file in entries.values() for name in file), "tensor", where)
    return entries


def _write(path: Path, file: SourceFile, entries: Mapping[str, Written], reader: _Reader) -> int:
    """Write one published file; returns its size."""
    header, digest = file.header.encode(), hashlib.sha256()
    dtypes = {code: name for name, code in CODES.items()}
    digest.update(len(header).to_bytes(LENGTH, "little") + header)

    def hashed(parts: Iterator[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            digest.update(memory(part))
            yield part

    with TensorFile(path, LENGTH + len(header)) as out:
        for name, entry in entries.items():
            dtype = dtypes[entry.dtype]
            written = out.append(hashed(reader.tensor(name, dtype)), dtype, entry.shape)
            if (written.begin, written.end) != (entry.begin, entry.end):
                raise CheckpointError(
                    f"{quoted(name)} was restored as bytes {written.begin} to {written.end} of {path.name}; the source "
                    f"had it at {entry.begin} to {entry.end}: find the tensor that changed with qvl verify"
                )
        out.finish(header)
    if file.exact and digest.hexdigest() != file.sha256:
        raise CheckpointError(f"{path.name} differs from the source: find the tensor that changed with qvl verify")
    return LENGTH + len(header) + out.size


def _small_files(source: Path, folder: Path, manifest: Manifest) -> None:
    """Copy configuration and tokenizer, and write the index, with new names where the files have new names."""
    for name, sha256 in manifest.companions.items():
        copy_file(check_inside(source, name), folder / name)
        if file_digest(folder / name) != sha256:
            raise CheckpointError(f"{source / name} was changed after the conversion: convert the source again")
    renamed = {name: file.restored_as for name, file in manifest.sources.items()}
    for name, text in manifest.indexes.items():
        index = _index(f"{source / MANIFEST}, {name},", text)
        files = set(index["weight_map"].values()) if index else set()
        if index and files <= renamed.keys() and any(renamed[file] != file for file in files):
            index["weight_map"] = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
            name, text = "model.safetensors.index.json", json.dumps(index, indent=2)
        if is_there(folder / name):
            raise CheckpointError(f"{source / MANIFEST} has two indexes for {name}: convert the source again")
        (folder / name).write_bytes(text.encode())


def _index(where: str, text: str) -> dict[str, Any]:
    """An index as JSON, with names of files alone; empty for a text that is no index, which is restored as it is."""
    try:
        index = parse_json(text.removeprefix("\ufeff"), where, CheckpointError)
    except CheckpointError:
        return {}
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        return {}
    check_names(weight_map.values(), ("*",), where)
    return dict(index)
