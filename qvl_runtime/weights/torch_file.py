"""A weight file that torch.save wrote, in either form, read without running code of the pickle in it."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_kernels.util import dtype_name
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.weights.pickle_checks import check_old_form, check_zip
from qvl_runtime.weights.tensor_info import TensorInfo, damaged

if TYPE_CHECKING:
    from torch import Tensor

OLD_FORM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, as protocol 2 of pickle writes it
_STATES = ("state_dict", "model_state_dict", "model", "module")  # what trainers call the weights among other things


class TorchShard:
    """A state_dict in a `.bin` file; tensors are mapped where the file has the form of torch 1.6 and later.

    The old form cannot be mapped: its tensors are read into memory when the first one is asked for.
    """

    restorable = False  # byte for byte: only the tensors of a pickle can be written again

    def __init__(self, path: Path, old_form: bool) -> None:
        """Raises `CheckpointError` for a damaged file, and for one that holds more than tensors."""
        reason = (
            "has the form of torch before 1.6"
            if old_form
            else "is a file of torch.save and named otherwise"
            if path.suffix == ".safetensors"  # torch.load goes by this name, unless it gets an open file
            else ""
        )
        self.note = reason and (
            f"{path.name} {reason}, so it cannot be mapped and its weights are held in memory: load and save it again"
        )
        self.metadata: dict[str, str] = {}
        self._path, self._old_form = path, old_form
        self._tensors = None if reason else self._read("cpu")
        listed = self._read("meta") if self._tensors is None else self._tensors
        self.infos = {name: TensorInfo(tuple(value.shape), dtype_name(value.dtype)) for name, value in listed.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, contiguous, on the CPU."""
        if self._tensors is None:
            self._tensors = self._read("cpu")
        return self._tensors[name].detach().contiguous()

    def _read(self, device: str) -> dict[str, Tensor]:
        import torch

        if not self._old_form and not _is_zip(self._path):  # torch's message blames mmap, whatever the cause
            raise damaged(self._path, "not a zip archive as torch >= 1.6 writes it")
        (check_old_form if self._old_form else check_zip)(self._path)
        size = self._path.stat().st_size
        state = _state(self._path, _load(self._path, device, mapped=not self.note))
        for name, value in state.items():
            if value.device.type != device or value.layout != torch.strided or value.is_quantized:
                raise CheckpointError(f"{self._path} holds {quoted(name)}, which is no plain tensor: save it as one")
            if value.numel() * value.element_size() > size:  # one element, repeated by strides of 0
                raise CheckpointError(
                    f"{self._path} holds {quoted(name)}, which is larger than the file: save it as one"
                )
        return state


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of an archive whose last record says that it has several disks
        return False


def _load(path: Path, device: str, mapped: bool) -> Any:
    import torch

    try:
        if mapped:
            return torch.load(path, map_location=device, mmap=True, weights_only=True)
        with path.open("rb") as file:
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and loading it could run code: save its state_dict as safetensors"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make torch's reader fail in any way
        raise damaged(path, error) from error


def _state(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a file: the content, or the one state_dict that a trainer stored among other things."""
    import torch

    def is_state(value: Any) -> bool:
        return isinstance(value, dict) and bool(value) and all(isinstance(t, torch.Tensor) for t in value.values())

    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state_dict")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        states = [key for key, value in content.items() if is_state(value)]
        if len(states) > 1:
            raise CheckpointError(
                f"{path} holds several states ({', '.join(map(quoted, states[:4]))}): save the one to run as a file of "
                "its own"
            )
        if states and states[0] in _STATES:
            content = content[states[0]]
    for name, value in content.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds a tensor named {quoted(name)}; expected a name")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path} holds {quoted(name)}, a {type(value).__name__}; expected only tensors")
    return dict(content)
