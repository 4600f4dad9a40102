"""The parameters of the rows of a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl_kernels.reference.sampling import SamplingRows
from qvl_runtime.prompt.token_mask import Mask
from qvl_runtime.schedule.penalties import PenaltyStack
from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.sampling_state import SamplingRow

# of temperature, top-k, top-p, min-p, random number, penalty and slot
DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64, torch.float32, torch.int64)


def sampling_rows(
    device: torch.device, rows: Sequence[SamplingRow], penalties: PenaltyStack, masks: bool = False
) -> SamplingRows | None:
    """The parameters of each row on the device; None if all rows select the likeliest token, of a mask or of all.

    penalties: of the step's rows. masks: rows with a mask select by it on the device. One copy moves the numbers.
    """
    slots = penalties.slots(row.state for row in rows)
    drawn = any(row.state.params.temperature for row in rows)
    if not drawn and max(slots) < 0 and not (masks and any(row.allowed is not None for row in rows)):
        return None
    columns = zip(*map(_values, rows, slots), strict=True)
    buffer = torch.zeros(len(DTYPES), len(rows), dtype=torch.int64)
    for own, dtype, column in zip(buffer, DTYPES, columns, strict=True):
        _typed(own, dtype).numpy()[:] = column
    temperature, top_k, top_p, min_p, uniform, penalty, slot = map(_typed, to_device(buffer, device), DTYPES)
    allowed = _masks([row.allowed for row in rows], device)
    parameters = SamplingRows(temperature, top_k, top_p, min_p, uniform, allowed=allowed)
    if max(slots) < 0:
        return parameters
    seen, bias = penalties.seen, penalties.bias
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
