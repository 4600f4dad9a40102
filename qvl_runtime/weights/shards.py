"""One weight file: names, shapes and dtypes without reading the data, then each tensor as a view of the mapped file.

The first bytes tell the format, not the name: a `.bin` may be safetensors, and the reverse.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.reading.regular_files import open_regular
from qvl_runtime.weights.tensor_file import CODES, LENGTH
from qvl_runtime.weights.tensor_info import TensorInfo, damaged
from qvl_runtime.weights.torch_file import OLD_FORM, TorchShard

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS_DTYPES = {code: name for name, code in CODES.items()}
MAX_HEADER = 16 << 20  # bytes: that of the published model has 0.2 million
_ZIP = b"PK\x03\x04"
_OTHERS = (  # first bytes, what they are, what to do
    (b"version https://git-lfs", "a git-lfs pointer, not weights", "run `git lfs pull` in its folder"),
    (b"GGUF", "a GGUF file of llama.cpp", "take the safetensors that it was converted from"),
    (b"<", "a web page, not weights", "download the file itself"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"\x93NUMPY", "an array of numpy", "save a state_dict as safetensors"),
    (b"\x89HDF", "an HDF5 file", "save a state_dict as safetensors"),
)


class Shard(Protocol):
    """An open weight file. Its tensors are mapped, valid after the shard is gone, and must not be written to."""

    infos: dict[str, TensorInfo]
    restorable: bool  # the file can be written again byte for byte from its header and its tensors
    metadata: dict[str, str]  # texts of the writer's choice
    note: str  # what is worth saying about how the file is read; empty if nothing is

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, contiguous, on the CPU."""
        ...


def open_shard(path: Path) -> Shard:
    """Open a weight file. Raises `CheckpointError` that names what is wrong with it."""
    try:
        with open_regular(path, CheckpointError) as file:
            head = file.read(64)
        if head.startswith((_ZIP, OLD_FORM)):
            return TorchShard(path, old_form=head.startswith(OLD_FORM))
        header_bytes = int.from_bytes(head[:LENGTH], "little")
        if head[LENGTH : LENGTH + 1] == b"{":
            return _SafetensorsShard(path, header_bytes)
        for start, found, way_out in _OTHERS:
            if head.lstrip().startswith(start):
                raise CheckpointError(f"{path} is {found}: {way_out}")
        if path.suffix == ".safetensors":
            return _SafetensorsShard(path, header_bytes)
        return TorchShard(path, old_form=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): check its permissions and the disk") from error


class _SafetensorsShard:
    restorable, note = True, ""

    def __init__(self, path: Path, header_bytes: int) -> None:
        if header_bytes > MAX_HEADER:
            raise damaged(path, f"a header of {header_bytes:,} bytes")
        self._path, self._file = path, _open_safetensors(path)
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.infos = {}
        for name in self._file.keys():  # noqa: SIM118 - not a dict
            header = self._file.get_slice(name)
            dtype = header.get_dtype()
            self.infos[name] = TensorInfo(tuple(header.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def tensor(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except Exception as error:  # a dtype that torch does not have, or a shape that it cannot hold
            raise damaged(self._path, f"{quoted(name)}: {error}") from error
        # A header may have any length, so data may start at any byte; kernels need aligned elements.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _open_safetensors(path: Path) -> Any:  # safetensors has no type annotations
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what its reader did not foresee
        raise damaged(path, error) from error
