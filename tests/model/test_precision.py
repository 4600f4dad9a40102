"""bfloat16 and float16: our distance from float32 is at most twice that of plain torch at the same precision.

The yardstick is a second implementation of the architecture in plain torch, the one that nano was trained with; in
float32 the two must agree, which also checks them against each other where the oracle is not at hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.finetune.network import Network
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.images import to_pixels
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Chunk, Runner, Span
from qvl_runtime.weights.checkpoint import load_state
from tests.model.oracle import LOGITS, VISION, close

pytestmark = pytest.mark.cpu


def _inputs(config: ModelConfig) -> tuple[list[int], np.ndarray]:
    rng = np.random.default_rng(3)
    visual = config.visual
    text = rng.integers(0, visual.image_start_id, 60).tolist()
    span = [visual.image_start_id, *[visual.image_pad_id] * visual.n_queries, visual.image_end_id]
    smooth = np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((24, 24, 1)))
    return text[:7] + span + text[7:], smooth.astype(np.uint8)[None]


def _ours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    config = ModelConfig.from_folder(NANO)
    ids, image = _inputs(config)
    model = QwenVL(config, load_state(NANO, config, dtype))
    cache = KVCache(config, 256, dtype, torch.device("cpu"))
    features = model.encode_images(to_pixels(image))
    with cache.sequence(ntk_alpha(config, len(ids))) as sequence:
        x = Runner(model, cache, ImageCache(1)).run([Chunk(sequence, ids, [Span(8, features[0])])])
    return features.float(), model.logits(x).float()


@torch.no_grad()
def _plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    config = ModelConfig.from_folder(NANO)
    ids, image = _inputs(config)
    network = Network(config)
    network.load_state_dict(load_state(NANO, config, torch.float32))
    network.to(dtype)
    features = network.visual(to_pixels(image))
    h = network.embed(torch.tensor([ids]), features, torch.tensor([[0, 8, 0]]))
    mask = torch.zeros(len(ids), len(ids), dtype=dtype).masked_fill_(
        ~torch.ones(len(ids), len(ids)).tril().bool(), -1e4
    )
    logits = network.logits(network.decode(h, torch.arange(len(ids))[None], mask[None, None]))
    return features.float(), logits[0].float()


def test_two_implementations_agree() -> None:
    for got, want, tolerance, name in zip(
        _ours(torch.float32), _plain(torch.float32), (VISION, LOGITS), "fl", strict=True
    ):
        close(got, want, tolerance * max(1.0, want.std().item()), {"f": "features", "l": "logits"}[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_torch(dtype: torch.dtype) -> None:
    exact = _plain(torch.float32)
    for ours, plain, right in zip(_ours(dtype), _plain(dtype), exact, strict=True):
        error, yardstick = (float((x - right).square().mean().sqrt()) for x in (ours, plain))
        assert 0 < error <= 2 * yardstick, f"rms error {error:.2e}, plain torch {yardstick:.2e}"
