"""The parameters of the rows of a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.reference.sampling import SamplingRows
from qvl_kernels.util import cdiv
from qvl_runtime.prompt.token_mask import Mask
from qvl_runtime.schedule.penalties import PenaltyStack
from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.sampling_state import SamplingRow


def sampling_rows(
    device: torch.device, rows: Sequence[SamplingRow], penalties: PenaltyStack, masks: bool = False
) -> SamplingRows | None:
    """The parameters of each row on the device; None if all rows select the likeliest token, of a mask or of all.

    penalties: of the step's rows. masks: rows with a mask select by it on the device.
    """
    slots = penalties.slots([row.state for row in rows])
    drawn = any(row.state.params.temperature for row in rows)
    if not drawn and max(slots) < 0 and not (masks and any(row.allowed is not None for row in rows)):
        return None
    parameters = _sent(rows, slots, device)._replace(allowed=_masks([row.allowed for row in rows], device))
    if max(slots) < 0:
        return parameters._replace(penalty=None, slots=None)
    seen, bias = penalties.seen, penalties.bias
    return parameters._replace(penalty=None if seen is None else parameters.penalty, seen=seen, bias=bias)


def _sent(rows: Sequence[SamplingRow], slots: Sequence[int], device: torch.device) -> SamplingRows:
    """The numbers of each row, moved by one copy: of five columns int64, three hold two of float32 or int32 each.

    Each begins at a multiple of 16 bytes, however many rows there are: Triton compiles a kernel for other pointers.
    """
    states, m = [row.state for row in rows], len(rows)
    width = 4 * cdiv(m, 4)
    drawn = [bool(state.params.temperature) for state in states]
    packed = np.zeros((5, width), np.int64)
    packed[0].view(np.float64)[:m] = [
        row.state.uniform(row.position) if draws else 0.0 for row, draws in zip(rows, drawn, strict=True)
    ]
    packed[1, :m] = slots
    halves = packed[2:].view(np.float32).reshape(6, width)
    halves[0, :m] = [state.params.temperature or 0.0 for state in states]
    halves[1, :m] = [1.0 if state.params.top_p is None else state.params.top_p for state in states]
    halves[2, :m] = [state.params.min_p for state in states]
    halves[3, :m] = [state.penalty for state in states]
    halves[4].view(np.int32)[:m] = [min(state.params.top_k or 0, 2**31 - 1) for state in states]
    sent = to_device(torch.from_numpy(packed), device)
    temperature, top_p, min_p, penalty, top_k, _ = sent[2:].view(torch.float32).view(6, width)[:, :m]
    uniform, slot = sent[0, :m].view(torch.float64), sent[1, :m]
    return SamplingRows(temperature, top_k.view(torch.int32), top_p, min_p, uniform, penalty, slots=slot)


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
