"""Sample the next token of all rows of a step at once, each with its own parameters and random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.ops import Ops
from qvl_runtime.errors import NumericsError
from qvl_runtime.prompt.token_mask import Mask, holds, tokens_of
from qvl_runtime.schedule.alternatives import InBoxes, Likeliest
from qvl_runtime.schedule.api import TokenLogprob
from qvl_runtime.schedule.numerics import numerics_error
from qvl_runtime.schedule.penalties import PenaltyStack
from qvl_runtime.schedule.readback import Readback, to_device
from qvl_runtime.schedule.sampling_rows import sampling_rows
from qvl_runtime.schedule.sampling_state import SamplingRow


class Sample(NamedTuple):
    """A sampled token and its log probability, or why there is none: then the two mean nothing."""

    token_id: int
    logprob: TokenLogprob
    error: NumericsError | None = None
    in_box: dict[int, float] | None = None  # within a box: log probabilities of the tokens that boxes are made of


class Sampled:
    """One token for each row of logits [m, vocab], by `ops.sample`, or `ops.greedy` if all are plain greedy.

    The tokens are on the device at once, and on the host once they are read: a step waits for its device there only.
    """

    def __init__(
        self, logits: Tensor, rows: Sequence[SamplingRow], ops: Ops, penalties: PenaltyStack, final: bool
    ) -> None:
        """final: `token_ids` are what `read` returns. Otherwise a mask alone does not need `ops.sample`.

        The likeliest of all tokens is usually allowed, and where it is not, `read` replaces it.
        """
        parameters = sampling_rows(logits.device, rows, penalties, masks=final)
        found = ops.greedy(logits) if parameters is None else ops.sample(logits, parameters)
        self.token_ids = found.token_ids  # int64 [m], on the device
        self._logits, self.rows, self._penalties = logits, rows, penalties
        self._tokens = Readback([found.token_ids, found.logprobs])
        self._likeliest: Likeliest | None = None
        if any(row.state.params.logprobs for row in rows):
            highest = found if parameters is None else ops.greedy(logits)
            self._likeliest = Likeliest(logits, highest.logprobs, rows)
        self._unchecked = parameters is None and any(row.allowed is not None for row in rows)
        self._in_boxes = None if self._unchecked else InBoxes(logits, found.token_ids, rows)

    def keep(self) -> None:
        """Copy what `read` may need of logits that the next step overwrites."""
        self._logits = self._logits.clone()

    def read(self) -> list[Sample]:
        """Wait for the tokens; the penalties of their rows count them from here on.

        A row without a distribution gives an error; its log probability, which is NaN, tells.
        """
        token_ids, logprobs = (tensor.tolist() for tensor in self._tokens.read())
        if self._unchecked:
            for i, row in enumerate(self.rows):
                if row.allowed is not None and not holds(row.allowed, token_ids[i]):
                    token_ids[i], logprobs[i] = _likeliest_allowed(
                        self._logits[i], row.allowed, token_ids[i], logprobs[i]
                    )
            ids = to_device(torch.tensor(token_ids), self._logits.device)
            self._in_boxes = InBoxes(self._logits, ids, self.rows)
        self._penalties.count([row.state for row in self.rows], token_ids)
        tops = [()] * len(token_ids) if self._likeliest is None else self._likeliest.read()
        in_boxes = {} if self._in_boxes is None else self._in_boxes.read(logprobs)
        return [
            Sample(token, TokenLogprob(token, logprob, top), self._error(i, logprob), in_boxes.get(i))
            for i, (token, logprob, top) in enumerate(zip(token_ids, logprobs, tops, strict=True))
        ]

    def _error(self, i: int, logprob: float) -> NumericsError | None:
        if not math.isnan(logprob):
            return None
        state = self.rows[i].state
        return numerics_error(self._logits[i], state.penalty, state.bias)


def sample(logits: Tensor, rows: Sequence[SamplingRow], ops: Ops = reference) -> list[Sample]:
    """Sample one token for each row of logits [m, vocab], and wait for them."""
    return Sampled(logits, rows, ops, PenaltyStack(), final=False).read()


def _likeliest_allowed(logits: Tensor, mask: Mask, first: int, logprob: float) -> tuple[int, float]:
    """The likeliest token of a mask, and its log probability, from those of the likeliest of all tokens."""
    ids = torch.from_numpy(tokens_of(mask)).to(logits.device)
    values = logits[ids].float()
    best, top = values.argmax(), logits[first].float()
    # in float32, as `ops.sample` adds them: the same number whatever the other rows of the step need
    chosen = torch.stack([ids[best].double(), (values[best] - top + logprob).double()]).tolist()
    return int(chosen[0]), chosen[1] if math.isfinite(chosen[1]) else math.nan
