"""Indexing of pretended tensors, by torch's operators: torch's own goes through the driver of the device."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def get_item(tensor: Tensor, key: Any) -> Tensor:
    """`tensor[key]`."""
    viewed, indices = _viewed(tensor, key)
    return aten.index.Tensor(viewed, indices) if indices else viewed


def set_item(tensor: Tensor, key: Any, value: Any) -> None:
    """`tensor[key] = value`."""
    viewed, indices = _viewed(tensor, key)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if indices:
        aten.index_put_.default(viewed, indices, value.to(tensor.device))
    else:
        viewed.copy_(value)


def _viewed(tensor: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view by all but tensors, and the tensors in their places; an empty list if there are none."""
    keys = [_tensor_or_same(one) for one in (key if isinstance(key, tuple) else (key,))]
    taken = sum(one.dim() if _is_mask(one) else one is not None and one is not ... for one in keys)
    if not any(isinstance(one, EllipsisType) for one in keys):
        keys.append(...)
    indices: list[Tensor | None] = []
    for one in keys:
        axis = len(indices)
        if isinstance(one, EllipsisType):
            indices += [None] * (tensor.dim() - axis - _later(keys, one))
        elif one is None:
            tensor = tensor.unsqueeze(axis)
            indices.append(None)
        elif isinstance(one, slice):
            tensor = aten.slice.Tensor(tensor, axis, one.start, one.stop, 1 if one.step is None else one.step)
            indices.append(None)
        elif isinstance(one, Tensor):
            indices += [one, *[None] * (one.dim() - 1 if _is_mask(one) else 0)]
        else:
            tensor = tensor.select(axis, int(one))
    if taken > tensor.dim() + sum(isinstance(one, int) for one in keys):
        raise IndexError(f"too many indices for tensor of dimension {tensor.dim()}")
    while indices and indices[-1] is None:
        indices.pop()
    return tensor, indices


def _later(keys: list[Any], ellipsis: Any) -> int:
    """Axes that the keys after the ellipsis take."""
    after = keys[next(i for i, one in enumerate(keys) if one is ellipsis) + 1 :]
    return sum(one.dim() if _is_mask(one) else 1 for one in after if one is not None)


def _is_mask(key: Any) -> bool:
    return isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8)


def _tensor_or_same(key: Any) -> Any:
    return torch.tensor(key) if isinstance(key, list) else key
