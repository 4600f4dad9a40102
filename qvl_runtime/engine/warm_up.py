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
from qvl_runtime.schedule.sampler import sample
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState
from qvl_runtime.schedule.scheduler import StepLimits

# Bytes of the device that stay unallocated: for graphs (for the full model 100 MB of logits and 64 rows of activations,
# and as much for 512 rows of a prompt), kernels that are compiled later, fragmentation, other programs and the driver.
MARGIN = 1 << 30


class Meter(Protocol):
    """Measures the memory of a device, in bytes."""

    def begin(self) -> None:
        """Start measuring growth from here."""
        ...

    def grown(self) -> int:
        """Return the peak growth since `begin`."""
        ...

    def free(self) -> int:
        """Return the bytes that can be allocated."""
        ...


def workspace_bytes(model: QwenVL, kv_dtype: torch.dtype, steps: StepLimits, meter: Meter) -> int:
    """Return the peak workspace of a step: the largest batch of images, then the largest prefill.

    The KV cache in `kv_dtype` that the step runs on is temporary and not counted. Running it also compiles the kernels
    of prefill, so that the first request does not wait for them.
    """
    meter.begin()
    visual = model.config.visual
    num_images = images_at_once(visual, model.dtype.itemsize, model.device.type)
    model.encode_images(torch.zeros(num_images, 3, visual.image_size, visual.image_size))
    images = meter.grown()
    meter.begin()
    cache = KVCache(model.config, steps.tokens, kv_dtype, model.device, prefixes=False)
    with cache.sequence(1.0) as sequence:
        logits_of = Runner(model, cache, ImageCache(1)).compute([Chunk(sequence, [0] * steps.tokens)])
        greedy = SamplingParams(temperature=0.0, repetition_penalty=1.0)
        row = SamplingRow(SamplingState(greedy, (), model.config.vocab_size, model.device), 0)
        sample(logits_of([*range(steps.running)]), [row] * steps.running)
    cache_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    return max(images, meter.grown() - cache_bytes)
