"""The choice of the next token where the logits are: what `sampler` defines, by a kernel.

On a GPU with one copy back, so that a step waits for its device once, when the tokens are read. On a CPU for steps that
want the likeliest tokens and nothing else, as most do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qvl_runtime.schedule.api import TokenLogprob
from qvl_runtime.schedule.sampler import Sample, SamplingRow, likeliest, sample

Sampler = Callable[[Tensor, Sequence[SamplingRow]], list[Sample]]


def sampler_for(ops: ModuleType) -> Sampler:
    """The sampler of a module of ops: its own kernel's where it has one."""
    return partial(sample_by, ops) if hasattr(ops, "sample") else partial(greedy_by, ops)


def greedy_by(ops: ModuleType, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sample]:
    """`sampler.sample`, in one pass over the logits where all rows take the likeliest."""
    if not all(_plain(row) for row in rows):
        return sample(logits, rows)
    both = zip(*(found.tolist() for found in ops.greedy(logits)), strict=True)
    return [Sample(token, TokenLogprob(token, logprob, ())) for token, logprob in both]


def _plain(row: SamplingRow) -> bool:
    """Whether a row takes the likeliest token, and says of no other how likely it was."""
    state = row.state
    return state.seen is None and state.bias is None and not state.params.temperature and not state.params.logprobs


def sample_by(ops: ModuleType, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sample]:
    """One token for each row of logits [m, vocab], as `sampler.sample` chooses it."""
    token_ids, logprobs = ops.sample(logits, _state(ops, logits.device, rows))
    both = torch.stack([token_ids.double(), logprobs.double()]).tolist()  # the one copy back; ids fit float64
    chosen = [int(token) for token in both[0]]
    for row, token in zip(rows, chosen, strict=True):
        if row.state.seen is not None:
            row.state.seen[token] = True
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    if any(row.state.params.logprobs for row in rows):
        raw = logits.float()
        tops = likeliest(raw, raw.logsumexp(-1), rows)
    return [
        Sample(token, TokenLogprob(token, logprob, top))
        for token, logprob, top in zip(chosen, both[1], tops, strict=True)
    ]


def _state(ops: ModuleType, device: torch.device, rows: Sequence[SamplingRow]) -> Any:
    """What the kernel wants to know of each row; None where all take the likeliest and nothing else.

    One copy brings the numbers. Rows with a penalty or a bias share one stack of what they have seen and of biases.
    """
    special = [i for i, row in enumerate(rows) if row.state.seen is not None or row.state.bias is not None]
    if not special and not any(row.state.params.temperature for row in rows):
        return None
    slots = dict(zip(special, range(len(special)), strict=True))
    numbers = [
        (
            p.temperature or 0.0,
            p.top_k or 0,
            1.0 if p.top_p is None else p.top_p,
            p.min_p,
            row.state.uniform(row.position),
            row.state.penalty,
            slots.get(i, -1),
        )
        for i, row in enumerate(rows)
        for p in (row.state.params,)
    ]
    temperature, top_k, top_p, min_p, uniforms, penalty, slot = (
        torch.tensor(numbers, dtype=torch.float64).t().contiguous().to(device, non_blocking=True)
    )
    kernel_rows = ops.SamplingRows(temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniforms)
    if not special:
        return kernel_rows
    states = [rows[i].state for i in special]
    seen, bias = _stacked([s.seen for s in states]), _stacked([s.bias for s in states])
    return kernel_rows._replace(
        penalty=None if seen is None else penalty.float(), slots=slot.long(), seen=seen, bias=bias
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors as rows of one, zeros where there is none; None where there are none at all."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
