"""Validate the tensors of a launch before a kernel could read past their end; each error is one line."""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels.triton.launch import interpreted
from qvl_kernels.util import dtype_name

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def tensor(op: str, name: str, value: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless `value` is contiguous, of this shape (None: any extent) and of one of these dtypes."""
    fits = value.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if fits and value.dtype in (dtypes or FLOATS) and value.is_contiguous():
        return
    expected = f"{' or '.join(dtype_name(dtype) for dtype in dtypes or FLOATS)} {_shape(shape)}"
    found = f"{dtype_name(value.dtype)} {_shape(tuple(value.shape))}{'' if value.is_contiguous() else ', strided'}"
    raise ValueError(f"{op}: {name} is {found}; expected contiguous {expected}")


def dtype(op: str, value: torch.dtype) -> None:
    """Raises ValueError unless an output's dtype is a float that the kernels write."""
    if value not in FLOATS:
        raise ValueError(f"{op}: the output is {dtype_name(value)}; expected {' or '.join(map(dtype_name, FLOATS))}")


def device(op: str, *tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device, a CUDA one or, in the interpreter, any."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors on {' and '.join(sorted(map(str, devices)))}; expected one device")
    types = {device.type for device in devices}
    if types - {"cuda"} and not interpreted():
        raise ValueError(
            f"{op}: tensors on {types.pop()}; Triton kernels run on cuda, or anywhere with TRITON_INTERPRET=1 set"
            " before triton is imported"
        )


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
