"""Which samples are computed together, in which order: a pure function of the data, a seed and the epoch.

A micro-batch is one row of whole samples, one after another without padding: positions restart with each, and
attention does not cross from one to the next (`functions.Documents`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.finetune.data import Sample
from qvl_runtime.finetune.functions import Documents
from qvl_runtime.finetune.keeping import Predictions, joined
from qvl_runtime.finetune.labels import IGNORED

WINDOW = 256  # shuffled samples that are packed together: more fill rows better and mix less


class Row(NamedTuple):
    """The tensors of one micro-batch of n tokens, on the CPU."""

    ids: Tensor  # int64 [n]
    positions: Tensor  # int64 [n], from 0 in each sample
    documents: Documents
    predicting: Tensor  # int64 [m], the tokens whose successor is learned
    targets: Tensor  # int64 [m], those successors
    keeping: Tensor  # int64 [l], the tokens of samples to keep whose successor is predicted as before
    kept: Predictions | None  # of these l tokens, once they are known
    image_starts: Tensor  # int64 [K], the first pad id of each image


def row_of(samples: Sequence[Sample]) -> Row:
    """Join samples to one row."""
    bounds = tuple(accumulate(map(len, samples), initial=0))
    labels = torch.tensor([label for sample in samples for label in (*sample.labels[1:], IGNORED)])
    keep = torch.tensor([sample.keep for sample in samples]).repeat_interleave(torch.tensor(list(map(len, samples))))
    predicting, keeping = ((labels != IGNORED).logical_and(own).nonzero()[:, 0] for own in (~keep, keep))
    kept = [sample.kept for sample in samples if sample.kept is not None]
    starts = [at + slot.start for sample, at in zip(samples, bounds, strict=False) for slot in sample.images]
    return Row(
        torch.tensor([token for sample in samples for token in sample.ids]),
        torch.cat([torch.arange(len(sample)) for sample in samples]),
        Documents(bounds),
        predicting,
        labels[predicting],
        keeping,
        joined(kept) if kept else None,
        torch.tensor(starts, dtype=torch.int64),
    )


def epoch_rows(lengths: Sequence[int], seed: int, epoch: int, batch: int, pack_to: int | None) -> list[list[int]]:
    """The samples of each micro-batch of an epoch, as indices.

    pack_to: tokens that a row may hold, with any number of samples; None: `batch` samples a row.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    if pack_to is None:
        return [order[i : i + batch] for i in range(0, len(order), batch)]
    rows = [
        row
        for start in range(0, len(order), WINDOW)
        for row in _packed(order[start : start + WINDOW], lengths, pack_to)
    ]
    rng.shuffle(rows)
    return rows


def _packed(indices: Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """First fit in the drawn order; a sample over the limit has a row of its own.

    Longest first would fill rows by 0 to 5 % more, with samples of one length, which are often of one kind: a step
    should see all kinds.
    """
    rows: list[tuple[int, list[int]]] = []
    for index in indices:
        at = next((at for at, (filled, _) in enumerate(rows) if filled + lengths[index] <= limit), None)
        if at is None:
            rows.append((lengths[index], [index]))
        else:
            rows[at] = (rows[at][0] + lengths[index], [*rows[at][1], index])
    return (row for _, row in rows)


class Schedule(NamedTuple):
    """The micro-batches of a whole run: step k takes `accumulate` of them."""

    lengths: Sequence[int]
    seed: int
    epochs: int
    batch: int
    pack_to: int | None
    accumulate: int

    def steps(self) -> list[list[list[int]]]:
        """The rows of every optimizer step; the last one of an epoch may have fewer."""
        steps = []
        for epoch in range(self.epochs):
            rows = epoch_rows(self.lengths, self.seed, epoch, self.batch, self.pack_to)
            steps += [rows[i : i + self.accumulate] for i in range(0, len(rows), self.accumulate)]
        return steps
