"""The loss of a micro-batch: images, decoder and cross-entropy of the tokens that are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl_runtime.errors import ImageError
from qvl_runtime.finetune.data import Sample
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.network import Network, Targets
from qvl_runtime.finetune.packing import row_of


class Learner:
    """Computes losses of samples with one network."""

    def __init__(self, network: Network, features: FeatureStore) -> None:
        self.network, self.features = network, features

    def loss_sum(self, samples: Sequence[Sample]) -> Tensor:
        """The sum of the losses of all learned tokens of these samples, computed as one row."""
        network, row = self.network, row_of(samples)
        device = self.features.device
        sources = [slot.source for sample in samples for slot in sample.images]
        images = self.features(sources) if sources else torch.empty(0)
        slots = torch.stack(
            [torch.zeros_like(row.image_starts), row.image_starts, torch.arange(len(row.image_starts))], 1
        )
        targets = Targets(row.predicting.to(device), row.targets.to(device))
        ids, positions = row.ids[None].to(device), row.positions[None].to(device)
        loss: Tensor = network(ids, images, slots.to(device), positions, row.documents, targets)
        return loss

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
        except ImageError:
            return False
        return True
