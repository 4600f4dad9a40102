"""The parameters of the rows of a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl_kernels.reference.sampling import SamplingRows
from qvl_runtime.prompt.token_mask import Mask
from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.sampling_state import SamplingRow

# of temperature, top-k, top-p, min-p, random number, penalty and slot
DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64, torch.float32, torch.int64)


def sampling_rows(device: torch.device, rows: Sequence[SamplingRow]) -> SamplingRows | None:
    """The parameters of each row on the device; None if all rows select the likeliest token, of a mask or of all.

    One copy moves the numbers. Rows with a penalty or a bias share one stack of seen tokens and of biases.
    """
    special = [i for i, row in enumerate(rows) if row.state.seen is not None or row.state.bias is not None]
    if not special and not any(row.state.params.temperature for row in rows):
        return None
    return _numbers(device, rows, special)


def masked_rows(device: torch.device, rows: Sequence[SamplingRow]) -> SamplingRows | None:
    """`sampling_rows`, but None only if no row has a mask either: those that select by a mask do so on the device."""
    parameters = sampling_rows(device, rows)
    if parameters is None and any(row.allowed is not None for row in rows):
        return _numbers(device, rows, [])
    return parameters


def _numbers(device: torch.device, rows: Sequence[SamplingRow], special: Sequence[int]) -> SamplingRows:
    """special: the rows that have penalties or biases."""
    slots = dict(zip(special, range(len(special)), strict=True))
    columns = zip(*(_values(row, slots.get(i, -1)) for i, row in enumerate(rows)), strict=True)
    buffer = torch.zeros(len(DTYPES), len(rows), dtype=torch.int64)
    for own, dtype, column in zip(buffer, DTYPES, columns, strict=True):
        _typed(own, dtype).numpy()[:] = column
    temperature, top_k, top_p, min_p, uniform, penalty, slot = map(_typed, to_device(buffer, device), DTYPES)
    allowed = _masks([row.allowed for row in rows], device)
    parameters = SamplingRows(temperature, top_k, top_p, min_p, uniform, allowed=allowed)
    if not special:
        return parameters
    states = [rows[i].state for i in special]
    seen, bias = _stacked([state.seen for state in states]), _stacked([state.bias for state in states])
    return parameters._replace(penalty=None if seen is None else penalty, slots=slot, seen=seen, bias=bias)


def _values(row: SamplingRow, slot: int) -> tuple[float, int, float, float, float, float, int]:
    state, params = row.state, row.state.params
    top_p = 1.0 if params.top_p is None else params.top_p
    uniform = state.uniform(row.position) if params.temperature else 0.0  # greedy rows draw none
    top_k = min(params.top_k or 0, 2**31 - 1)
    return params.temperature or 0.0, top_k, top_p, params.min_p, uniform, state.penalty, slot


def _typed(column: Tensor, dtype: torch.dtype) -> Tensor:
    """The start of a column int64 [m] as m numbers of another dtype, without a copy."""
    return column.view(dtype)[: len(column)]


def _masks(masks: Sequence[Mask | None], device: torch.device) -> Tensor | None:
    """The masks of all rows, int32 [m, words]; None if no row has one."""
    words = next((len(mask) for mask in masks if mask is not None), None)
    if words is None:
        return None
    stacked = torch.full((len(masks), words), -1, dtype=torch.int32)
    for row, mask in zip(stacked.numpy(), masks, strict=True):
        if mask is not None:
            row[:] = mask
    return to_device(stacked, device)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors, zeros for None; None if all are None."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
