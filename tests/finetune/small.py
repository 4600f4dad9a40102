"""A small trainable model on the CPU, and samples for it."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.data import Sample
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.labels import IGNORED
from qvl_runtime.finetune.learner import Learner
from qvl_runtime.finetune.opening import open_network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.prompt.records import Conversation
from qvl_runtime.prompt.segment import ImageSlot

CPU = torch.device("cpu")


def sample(config: ModelConfig, seed: int, text: int = 12, image: bool = True) -> Sample:
    """Random tokens with an image among them; every second token after it is learned."""
    rng = np.random.default_rng(seed)
    visual = config.visual
    ids = rng.integers(0, 200, text).tolist()
    slots: tuple[ImageSlot, ...] = ()
    if image:
        ids[3:3] = [visual.image_start_id, *[visual.image_pad_id] * visual.n_queries, visual.image_end_id]
        slots = (ImageSlot(4, rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)),)
    labels = [token if i % 2 and (not image or i > 6 + visual.n_queries) else IGNORED for i, token in enumerate(ids)]
    return Sample(Conversation(f"sample {seed}", ()), array("q", ids), array("q", labels), slots)


def learner(folder: Path, converted: torch.dtype | None = None, **options: Any) -> Learner:
    """A learner on a checkpoint; with `converted`, all its weights are converted."""
    own = FinetuneOptions(**{"dtype": "float32", "checkpointing": False, **options})
    network = open_network(folder, ModelConfig.from_folder(folder), own, CPU)
    if converted is not None:
        network.to(converted)
    return Learner(network, FeatureStore(network, 1 << 30))
