"""Tensors on a device that is not there: torch's FakeTensor for CUDA, ordinary ones for the CPU.

An op of a tensor on CUDA computes shapes and dtypes, and raises what torch raises for devices that do not match. What
is copied to the host is zeros; a value that is read there is 0, or True.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.gpu.dry_run.indexing import get_item, set_item

READ = ("item", "__bool__", "__int__", "__float__", "__index__")  # on the host
SAME = "equal"


class PretendedTensors(TorchDispatchMode):
    """Sends what touches CUDA to FakeTensor, and everything else to the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op on one side or the other."""
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        leaves = tree_leaves((args, kwargs))
        faked = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not faked and not to_cuda:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name == SAME:
            return True
        if name == "bincount":  # how often each value is there: once, as in a permutation
            return torch.ones(kwargs.get("minlength", args[2] if len(args) > 2 else 0), dtype=torch.int64)
        with self._fake:
            args, kwargs = tree_map(_faked, (args, kwargs))
            made = func(*args, **kwargs)
        return tree_map(_on_its_side, made)


def _numbered(value: Any) -> Any:
    """A device "cuda" with the number of the only one."""
    if (isinstance(value, str) and value == "cuda") or (isinstance(value, torch.device) and value.type == "cuda"):
        return torch.device("cuda", 0)
    return value


def _moving(function: Any) -> Any:
    """Tensor.to, which would ask the driver for the number of the device."""
    return lambda tensor, *rest, **named: function(tensor, *tree_map(_numbered, rest), **tree_map(_numbered, named))


def _faked(value: Any) -> Any:
    """A tensor of the host without its numbers; a device "cuda" with the number of the only one."""
    value = _numbered(value)
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value


def _on_its_side(value: Any) -> Any:
    """Zeros instead of a result on the host."""
    if isinstance(value, FakeTensor) and value.device.type == "cpu":
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


def _reading(function: Any) -> Any:
    """What reads a value, for tensors that have none as well: of a copy on the host."""

    def read(tensor: Tensor) -> Any:
        if tensor.device.type == "cpu":
            return function(tensor)
        host = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return function(~host if tensor.dtype == torch.bool else host)

    return read


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return tensor if tensor.is_contiguous(memory_format=memory_format) else tensor.clone(memory_format=memory_format)


def _nowhere(tensor: Tensor) -> Tensor:
    """The places of values that are not zero: of none."""
    return tensor.new_empty(0, tensor.dim(), dtype=torch.int64)


def _address(tensor: Tensor) -> int:
    """A number of its own for each storage, and the tensor's offset in it."""
    return int(tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())


def _copying(function: Any) -> Any:
    """Tensor.copy_, between host and device as well."""

    def copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if to.device.type == "cpu":
            source = torch.zeros(source.shape, dtype=source.dtype) if source.device.type != "cpu" else source
            return function(to, source)  # type: ignore[no-any-return]
        if torch.broadcast_shapes(to.shape, source.shape) != to.shape:  # type: ignore[no-untyped-call]
            raise RuntimeError(f"copy_: {tuple(source.shape)} does not broadcast to {tuple(to.shape)}")
        return to

    return copy


def _if_pretended(ours: Any, torchs: Any) -> Any:
    """One function for tensors that have no numbers, another for the others."""
    return lambda tensor, *rest, **named: (torchs if tensor.device.type == "cpu" else ours)(tensor, *rest, **named)


@contextmanager
def pretended_tensors() -> Iterator[None]:
    """Let torch make tensors on CUDA, and pin memory, without either."""

    class Generator(torch.Generator):
        """A generator of the CPU for any device."""

        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        if tensor.device.type != "cpu":
            raise RuntimeError(f"cannot pin a tensor on {tensor.device}")
        return tensor.clone()

    patches: list[AbstractContextManager[object]] = [
        patch.object(fake_tensor, "init_gpu_context", lambda device: None),
        patch.object(torch, "Generator", Generator),
        patch.object(Tensor, "pin_memory", pinned),
        patch.object(Tensor, "copy_", _copying(Tensor.copy_)),
        patch.object(Tensor, "to", _moving(Tensor.to)),
        patch.object(Tensor, "contiguous", _if_pretended(_contiguous, Tensor.contiguous)),
        patch.object(Tensor, "data_ptr", _if_pretended(_address, Tensor.data_ptr)),
        patch.object(Tensor, "nonzero", _if_pretended(_nowhere, Tensor.nonzero)),
        patch.object(Tensor, "__invert__", _if_pretended(torch.bitwise_not, Tensor.__invert__)),
        patch.object(Tensor, "__getitem__", _if_pretended(get_item, Tensor.__getitem__)),
        patch.object(Tensor, "__setitem__", _if_pretended(set_item, Tensor.__setitem__)),
        *(patch.object(Tensor, name, _reading(getattr(Tensor, name))) for name in READ),
    ]
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes a tensor on the CPU first, then copies it
    try:
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one)
            stack.enter_context(PretendedTensors())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
