"""What else a position could have been: the likeliest tokens of a row, and within boxes the tokens of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qvl_runtime.schedule.readback import Readback, to_device
from qvl_runtime.schedule.sampling_state import SamplingRow


class Likeliest:
    """The `logprobs` likeliest tokens of each row, with their log probabilities, on their way to the host.

    Rows of one number are searched together: which of equals are found depends on how many are asked for.
    """

    def __init__(self, raw: Tensor, highest: Tensor, rows: Sequence[SamplingRow]) -> None:
        """raw: logits [m, vocab]; highest [m]: the log probability of the likeliest token of each row."""
        counts = [min(row.state.params.logprobs or 0, raw.shape[1]) for row in rows]
        self._rows, self._at, found = len(rows), list[list[int]](), list[Tensor]()
        for count in sorted({*counts} - {0}):
            self._at.append(at := [i for i, wanted in enumerate(counts) if wanted == count])
            index = to_device(torch.tensor(at), raw.device)
            values, ids = raw[index].float().topk(count)
            found += ids, values - values[:, :1] + highest[index, None]
        self._found = Readback(found)

    def read(self) -> list[tuple[tuple[int, float], ...]]:
        """Return pairs of token and log probability for each row; none for a row that asks for none."""
        rows: list[tuple[tuple[int, float], ...]] = [()] * self._rows
        found = [tensor.tolist() for tensor in self._found.read()]
        for at, ids, logprobs in zip(self._at, found[::2], found[1::2], strict=True):
            for i, tokens, numbers in zip(at, ids, logprobs, strict=True):
                rows[i] = tuple(zip(tokens, numbers, strict=True))
        return rows


class InBoxes:
    """The log probabilities of what boxes are made of, of the rows within boxes, on their way to the host."""

    def __init__(self, logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> None:
        """token_ids int64 [m]: the sampled ones."""
        spellings = [(i, row.state.spelling) for i, row in enumerate(rows) if row.in_box]
        self._within = [i for i, spelling in spellings if spelling is not None]
        self._alphabet: tuple[int, ...] = ()
        self._found: Readback | None = None
        if not self._within or (spelling := spellings[0][1]) is None:
            return
        self._alphabet = spelling.alphabet
        if len(self._within) < len(rows):
            at = to_device(torch.tensor(self._within), logits.device)
            logits, token_ids = logits[at], token_ids[at]
        ids = _on_device(self._alphabet, logits.device).expand(len(logits), -1)
        self._found = Readback([logits.gather(1, torch.cat([ids, token_ids[:, None]], dim=1))])

    def read(self, logprobs: Sequence[float]) -> dict[int, dict[int, float]]:
        """Return log probabilities by token for each row within a box; logprobs: of the sampled tokens of all rows."""
        if self._found is None:
            return {}
        boxes = {}
        for i, found in zip(self._within, self._found.read()[0].tolist(), strict=True):
            normalizer = found[-1] - logprobs[i]
            boxes[i] = {t: value - normalizer for t, value in zip(self._alphabet, found, strict=False)}
        return boxes


@lru_cache(maxsize=4)
def _on_device(alphabet: tuple[int, ...], device: torch.device) -> Tensor:
    """The same tokens for every step, copied once."""
    return to_device(torch.tensor(alphabet), device)
