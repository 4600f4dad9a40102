"""The loss of a micro-batch: images, decoder and cross-entropy of the tokens that are learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.errors import DownloadError, ImageError
from qvl_runtime.finetune.data import Sample
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.functions import Documents
from qvl_runtime.finetune.network import Kept, Losses, Network, Targets
from qvl_runtime.finetune.packing import Row, row_of
from qvl_runtime.finetune.sharded import is_sharded

UNREADABLE = (ImageError, DownloadError)  # what an image that cannot be read raises


class Inputs(NamedTuple):
    """The first arguments of the network's methods."""

    ids: Tensor
    images: Tensor
    slots: Tensor
    positions: Tensor
    visible: Documents


class Learner:
    """Computes losses of samples with one network."""

    def __init__(self, network: Network, features: FeatureStore) -> None:
        self.network, self.features = network, features

    def losses(self, samples: Sequence[Sample]) -> Losses:
        """The sums of the losses of all tokens of these samples that are learned or kept, computed as one row."""
        row, device = row_of(samples), self.features.device
        targets = Targets(row.predicting.to(device), row.targets.to(device))
        kept = None if row.kept is None else Kept(row.keeping.to(device), row.kept.to(device))
        losses: Losses = self.network(*self._inputs(row, samples), targets, kept)
        return losses

    def loss_sum(self, samples: Sequence[Sample]) -> Tensor:
        """The sum of the losses of all learned tokens of these samples."""
        return self.losses(samples).learned

    def remember(self, samples: list[Sample], progress: Callable[[], None] = lambda: None) -> None:
        """Give the samples to keep, in place, what the network predicts as it is; before any of it is trained.

        One whose image cannot be read gets nothing, and the run leaves it out; with sharded weights, whose other
        processes wait for it, that raises `ImageError` or `DownloadError`. progress: called after each. Every process
        must call it.
        """
        sharded = any(is_sharded(parameter) for parameter in self.network.parameters())
        self.network.eval()
        for index, sample in enumerate(samples):
            if not sample.keep:
                continue
            if sharded or self.readable([sample]):
                row = row_of([sample])
                predicting = row.keeping.to(self.features.device)
                samples[index] = replace(sample, kept=self.network.predict(*self._inputs(row, [sample]), predicting))
            progress()
        self.network.train()

    def _inputs(self, row: Row, samples: Sequence[Sample]) -> Inputs:
        device = self.features.device
        sources = [slot.source for sample in samples for slot in sample.images]
        images = self.features(sources) if sources else torch.empty(0)
        slots = torch.stack(
            [torch.zeros_like(row.image_starts), row.image_starts, torch.arange(len(row.image_starts))], 1
        )
        ids, positions = row.ids[None].to(device), row.positions[None].to(device)
        return Inputs(ids, images, slots.to(device), positions, row.documents)

    @torch.no_grad()
    def mean_loss(self, samples: Sequence[Sample], at_once: int = 8) -> float:
        """The mean loss of the learned tokens of held-out samples."""
        self.network.eval()
        total, count = 0.0, 0
        for start in range(0, len(samples), at_once):
            part = samples[start : start + at_once]
            total += float(self.loss_sum(part))
            count += sum(sample.num_targets for sample in part)
        self.network.train()
        return total / max(1, count)

    def readable(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those of the samples whose images can be read."""
        return [sample for sample in samples if self._is_readable(sample)]

    def _is_readable(self, sample: Sample) -> bool:
        try:
            with torch.no_grad():
                for slot in sample.images:
                    self.features([slot.source])
        except UNREADABLE:
            return False
        return True
