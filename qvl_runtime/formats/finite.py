"""Refuse weights that are NaN or infinite, or become so in float16, where a weight is converted or packed anyway.

One pass for the smallest and largest value: 40 ms for 33 million values in float16, where their conversion takes 176.
A CPU's mapped weights are not read for this: there a request without finite logits tells (`schedule/numerics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qvl_kernels.util import dtype_name
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.host_memory import pieces

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def finite(name: str, values: Tensor, source: Tensor | None = None, always: bool = False) -> Tensor:
    """Return `values`, what the weight `name` was converted to. Raises `CheckpointError` unless all are finite.

    source: the weight as stored. If it is the same memory, its file is only mapped, and is read if `always` is set.
    """
    stored = values if source is None else source
    mapped = source is not None and values.device == stored.device and values.data_ptr() == stored.data_ptr()
    if not values.is_floating_point() or not values.numel() or values.is_meta or (mapped and not always):
        return values
    low, high = (float(extreme) for extreme in values.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return values
    low, high = (float(extreme) for extreme in stored.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        largest = high if high > -low else low
        raise CheckpointError(
            f"{name} holds {largest:g}, which overflows {dtype_name(values.dtype)}: use the dtype bfloat16 or float32"
        )
    found = "NaN" if math.isnan(low) or math.isnan(high) else "an infinite value"
    raise CheckpointError(
        f"{name} holds {found}: the file is damaged, or the training diverged: fetch it again, or use an earlier "
        "checkpoint of the training"
    )


def finite_pieces(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """`pieces` of a mapped weight in `dtype`. Raises `CheckpointError` at the first that is not finite."""
    yield from pieces(tensor, dtype, check=lambda part, converted: finite(name, converted, part, always=True))
