"""One weight file: names, shapes and dtypes without reading the data, then each tensor as a view of the mapped file."""

from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qvl_kernels.util import dtype_name
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.tensor_file import CODES

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS_DTYPES = {code: name for name, code in CODES.items()}
_LFS_POINTER = b"version https://git-lfs"


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor; the dtype as torch spells it without the prefix, such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        import torch

        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


class Shard(Protocol):
    """An open weight file. Its tensors are mapped, valid after the shard is gone, and must not be written to."""

    infos: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, contiguous, on the CPU."""
        ...


def open_shard(path: Path) -> Shard:
    """Open a `.safetensors` or `.bin` file. Raises `CheckpointError` that names what is wrong with it."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again")
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(f"{path} is a git-lfs pointer, not weights: run `git lfs pull` in its folder")
        return _SafetensorsShard(path) if path.suffix == ".safetensors" else _TorchShard(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): check its permissions and the disk") from error


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self._file = _open_safetensors(path)
        self.infos = {}
        for name in self._file.keys():  # noqa: SIM118 - not a dict
            header = self._file.get_slice(name)
            dtype = header.get_dtype()
            self.infos[name] = TensorInfo(tuple(header.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        # A header may have any length, so data may start at any byte; kernels need aligned elements.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


class _TorchShard:
    def __init__(self, path: Path) -> None:
        import torch

        if not zipfile.is_zipfile(path):  # torch's own message blames mmap, whatever the cause
            raise _damaged(path, "not a zip archive as torch >= 1.6 writes it")
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors, and loading it could run code: save its state_dict as safetensors"
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}; expected a state_dict")
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"{path} holds {name!r}, a {type(value).__name__}; expected only tensors")
        self._tensors: dict[str, Tensor] = tensors
        self.infos = {name: TensorInfo(tuple(value.shape), dtype_name(value.dtype)) for name, value in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous()


def _open_safetensors(path: Path) -> Any:  # safetensors has no type annotations
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, cause: object) -> CheckpointError:
    lines = str(cause).strip().splitlines()
    detail = lines[0] if lines else type(cause).__name__
    return CheckpointError(
        f"{path} is damaged or truncated at {path.stat().st_size} bytes ({detail}): fetch the file again"
    )
