"""Measure the workspace of a model, beyond its weights and caches, by running the largest step once before serving."""

from __future__ import annotations

from typing import Protocol

import torch

from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.plan.sizes import images_at_once
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Chunk, Runner
from qvl_runtime.schedule.sampler import SamplingRow, SamplingState, sample
from qvl_runtime.schedule.scheduler import StepLimits

# Of the device, left alone: graphs (100 MB of logits and 64 rows of activations for the full model), kernels that are
# compiled later, fragments, and what other programs and the driver take meanwhile.
MARGIN = 1 << 30


class Meter(Protocol):
    """A device's memory, in bytes."""

    def begin(self) -> None:
        """From here on growth is counted."""
        ...

    def grown(self) -> int:
        """By how much more than at `begin` was held at most."""
        ...

    def free(self) -> int:
        """What can be had."""
        ...


def workspace_bytes(model: QwenVL, kv_dtype: torch.dtype, steps: StepLimits, meter: Meter) -> int:
    """Return the peak workspace of a step: as many images as are encoded at once, then a prefill of the most tokens.

    The KV cache in `kv_dtype` that the step runs on is temporary and not counted. Running it also compiles the kernels
    of prefill, so that the first request does not wait for them.
    """
    meter.begin()
    visual = model.config.visual
    many = images_at_once(visual, model.dtype.itemsize, model.device.type)
    model.encode_images(torch.zeros(many, 3, visual.image_size, visual.image_size))
    images = meter.grown()
    meter.begin()
    cache = KVCache(model.config, steps.tokens, kv_dtype, model.device, prefixes=False)
    with cache.sequence(1.0) as sequence:
        logits_of = Runner(model, cache, ImageCache(1)).compute([Chunk(sequence, [0] * steps.tokens)])
        greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
        row = SamplingRow(SamplingState(greedy, (), model.config.vocab_size, model.device), 0)
        sample(logits_of([*range(steps.running)]), [row] * steps.running)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    return max(images, meter.grown() - held)
