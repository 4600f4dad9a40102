"""Write one safetensors file tensor by tensor, with the SHA-256 of each; the header is written last.

A safetensors file is the length of its header (8 bytes), a JSON header, and the bytes of the tensors without gaps. The
header is padded with spaces, so that the tensors start at a chosen offset.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.checks import LARGEST_INT
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.reading.json_text import parse_json

if TYPE_CHECKING:
    from torch import Tensor

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    # None of a model's weights has one of these; a tensor that is kept to restore the source may.
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
FLUSH = 128 << 20  # bytes after which a background fsync starts
LENGTH = 8  # bytes of the header's length
MAX_DIMS = 64  # dimensions, as many as torch has


class Written(NamedTuple):
    """A tensor as it was written."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    begin: int  # byte offsets from the start of the first tensor
    end: int
    sha256: str


class TensorFile:
    """A file that appears by a rename when it is complete. Use it in a `with` block, and call `finish` inside."""

    def __init__(self, path: Path, data_start: int, digests: bool = True) -> None:
        """data_start: offset of the tensors in the file; the length and the header must fit before it."""
        self._digests = digests
        self.path, self.size, self._data_start = path, 0, data_start
        self._partial = path.with_name(f"{path.name}.part")
        self._file = self._partial.open("wb", buffering=0)
        self._file.seek(data_start)
        self._hashing = ThreadPoolExecutor(1)  # hashing 1 GB takes a second or two, like writing it
        self._flushing, self._flushed_to = ThreadPoolExecutor(1), 0
        self._flush: Future[None] | None = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hashing.shutdown()
        self._flushing.shutdown()
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def append(self, parts: Iterable[Tensor], dtype: str, shape: tuple[int, ...]) -> Written:
        """Write a tensor from its pieces, in order."""
        begin, digest = self.size, hashlib.sha256()
        for part in parts:
            view = memory(part)
            hashed = self._hashing.submit(digest.update, view) if self._digests else None
            self._write(view)
            if hashed is not None:
                hashed.result()
            self.size += len(view)
            self._flush_behind()
        return Written(CODES[dtype], shape, begin, self.size, digest.hexdigest() if self._digests else "")

    def finish(self, header: bytes) -> bytes:
        """Write the header and rename the file; returns everything before the tensors.

        Raises `ValueError` for a header that does not fit, `CheckpointError` for a full disk.
        """
        reserved = self._data_start - LENGTH
        if len(header) > reserved:
            raise ValueError(f"a header of {len(header)} bytes does not fit into the {reserved} reserved for it")
        front = reserved.to_bytes(LENGTH, "little") + header.ljust(reserved)
        self._file.seek(0)
        self._write(memoryview(front))
        with self._full_disk_error():
            if self._flush is not None:
                self._flush.result()  # the system reports a full disk only once
            os.fsync(self._file.fileno())
            self._file.close()
        self._partial.replace(self.path)
        return front

    def _flush_behind(self) -> None:
        """Keep the disk busy while more is written, so that `finish` does not wait for a gigabyte."""
        if self._flush is not None and self._flush.done():
            with self._full_disk_error():
                self._flush.result()
            self._flush = None
        if self._flush is None and self.size - self._flushed_to >= FLUSH:
            self._flushed_to = self.size
            self._flush = self._flushing.submit(os.fsync, self._file.fileno())

    def _write(self, view: memoryview) -> None:
        with self._full_disk_error():
            while view:
                view = view[self._file.write(view) :]

    @contextmanager
    def _full_disk_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"the disk is full at byte {self.size:,} of {self.path.name} in {self.path.parent}: make room and "
                "rerun the same command"
            ) from error


def header_of(tensors: dict[str, Written]) -> bytes:
    """The JSON header of a file with these tensors, in order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, t in tensors.items():
        entries[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
    return json.dumps(entries, separators=(",", ":")).encode()


def read_entries(header: str, where: str) -> dict[str, Written]:
    """The tensors of a JSON header, in the order of their bytes and without digests.

    where: what to call the header. Raises `CheckpointError` unless they fill a file from its start, without gaps.
    """
    content = parse_json(header, where, CheckpointError, "convert the source again")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} is no header of a safetensors file: convert the source again")
    content.pop("__metadata__", None)
    entries = {name: _entry(raw, f"{where}, {quoted(name)},") for name, raw in content.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise CheckpointError(f"{where}, {quoted(name)}, begins at {entry.begin}; expected {end}")
        end = entry.end
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _entry(raw: object, where: str) -> Written:
    """One entry of a header. Raises `CheckpointError` for another dtype or shape than its bytes have."""
    import torch

    names = {code: name for name, code in CODES.items()}
    entry = raw if isinstance(raw, dict) else {}
    code, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if isinstance(code, str) and code in names and shape is not None and offsets is not None and len(offsets) == 2:
        begin, end = offsets
        if end - begin == math.prod(shape) * getattr(torch, names[code]).itemsize:
            return Written(code, shape, begin, end, "")
    raise CheckpointError(f"{where} is {quoted(raw)}, which describes no tensor: convert the source again")


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on; None for anything else."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size <= LARGEST_INT for size in value) else None


def read_header(path: Path) -> bytes:
    """The JSON header of a valid safetensors file, with its padding."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(LENGTH), "little"))


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; a contiguous one is not copied."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
