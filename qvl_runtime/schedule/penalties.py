"""The seen tokens and biases of all rows of a step, in one tensor each: kept from step to step while the rows stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.sampling_state import SamplingState


class PenaltyStack:
    """Holds the `seen` and `bias` of the states in the latest step, which are views of its rows.

    So a step copies none of them unless other states take part, and all count their tokens in one launch each: on a
    GPU, 64 answers with a penalty would need 64.
    """

    def __init__(self) -> None:
        self.seen: Tensor | None = None  # bool [s, vocab]
        self.bias: Tensor | None = None  # float32 [s, vocab]
        self._slots: dict[SamplingState, int] = {}

    def slots(self, states: Iterable[SamplingState]) -> list[int]:
        """Return the row of each state, -1 for one without penalties and biases; stacks those that it does not hold."""
        every = list(states)
        special = [state for state in every if state.seen is not None or state.bias is not None]
        wanted = dict.fromkeys(special)
        if list(wanted) != list(self._slots):
            self._stack(list(wanted))
        return [self._slots.get(state, -1) for state in every]

    def count(self, states: Sequence[SamplingState], tokens: Sequence[int]) -> None:
        """Have the penalties of each state count its token."""
        held = [(self._slots[state], state, token) for state, token in zip(states, tokens, strict=True)
                if state in self._slots]  # fmt: skip
        self._mark([(slot, token) for slot, state, token in held if state.seen is not None])
        self._set([(slot, token, state.counted(token)) for slot, state, token in held if state.counts])

    def _stack(self, states: Sequence[SamplingState]) -> None:
        for state in self._slots.keys() - set(states):  # the old stack is not kept for the sake of their rows
            state.seen = None if state.seen is None else state.seen.clone()
            state.bias = None if state.bias is None else state.bias.clone()
        self.seen, self.bias = _stacked([s.seen for s in states]), _stacked([s.bias for s in states])
        self._slots = {state: slot for slot, state in enumerate(states)}
        for slot, state in enumerate(states):
            if state.seen is not None and self.seen is not None:
                state.seen = self.seen[slot]
            if state.bias is not None and self.bias is not None:
                state.bias = self.bias[slot]

    def _mark(self, marks: Sequence[tuple[int, int]]) -> None:
        if marks and self.seen is not None:
            slots, tokens = to_device(torch.tensor(marks).t().contiguous(), self.seen.device)
            self.seen[slots, tokens] = True

    def _set(self, biases: Sequence[tuple[int, int, float]]) -> None:
        if biases and self.bias is not None:
            slots, tokens, values = to_device(
                torch.tensor(biases, dtype=torch.float64).t().contiguous(), self.bias.device
            )
            self.bias[slots.long(), tokens.long()] = values.float()


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors, zeros for None; None if all are None."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
