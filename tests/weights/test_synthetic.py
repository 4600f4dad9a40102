"""Random models: every tensor of the configuration, of its shape, and a forward pass that stays finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.host import resident_memory
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Chunk, Runner
from qvl_runtime.weights.synthetic import SyntheticState, _mapped, _tiled, synthetic_config, synthetic_weights

NANO = Path(__file__).resolve().parents[2] / "qvl_runtime" / "nano_int4"


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    return ModelConfig.from_folder(NANO)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["qwen-vl-chat", "qwen-vl-chat-int4"])
def test_the_published_sizes(name: str, small: ModelConfig) -> None:
    """9.6 billion parameters: 3.4 GB of packed decoder, or 12.9 GB of it in 16 bits."""
    config = synthetic_config(name, small)
    shapes = {n: s.shape for n, s in expected_tensors(config).items() if not s.optional}
    packed = sum(4 * torch.Size(s).numel() for n, s in shapes.items() if n.endswith("qweight"))
    dense = sum(torch.Size(s).numel() for n, s in shapes.items() if not n.endswith(("qweight", "qzeros", "scales")))
    assert packed / 4 * 8 + dense == pytest.approx(9.6e9, rel=0.01)


@pytest.mark.unit
def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"'qwen-vl'.*qwen-vl-chat-int4"):
        synthetic_config("qwen-vl", ModelConfig.from_folder(NANO))


@pytest.mark.unit
def test_blocks_that_are_repeated_share_their_memory(small: ModelConfig) -> None:
    state = SyntheticState(small, torch.bfloat16, repeat_blocks=True)
    first, second = (state[f"transformer.h.{i}.attn.c_attn.qweight"] for i in (0, 1))
    assert first is second
    assert state["transformer.wte.weight"] is not state["lm_head.weight"]


@pytest.mark.unit
@pytest.mark.parametrize("shape", [(24576, 1024), (6000, 1024), (3, 1024)])
def test_a_table_in_memory_like_a_mapped_file(shape: tuple[int, int]) -> None:
    """The same numbers as a filled one, of which only what is read or written is resident."""
    noise = torch.randn(1 << 22)
    table, filled = _mapped(noise, shape, torch.bfloat16), _tiled(noise, shape, torch.bfloat16)
    before = resident_memory()
    assert torch.equal(table[shape[0] - 3 :], filled[shape[0] - 3 :])
    assert resident_memory() - before < 4 << 20
    table[0] = 0
    assert torch.equal(table[1:], filled[1:])


@pytest.mark.cpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_a_small_one_runs(small: ModelConfig, precision: str, cache_dtype: torch.dtype) -> None:
    state, packed, _ = synthetic_weights(small, torch.bfloat16, torch.device("cpu"))
    model = QwenVL(small, state, precision, packed)
    assert not list(state), "a state is emptied as its weights are bound"
    cache = KVCache(small, 64, cache_dtype, torch.device("cpu"))
    runner = Runner(model, cache, ImageCache(1 << 20))
    with cache.sequence(1.0) as sequence:
        runner.run([Chunk(sequence, range(20))])
        logits = model.logits(runner.run([Chunk(sequence, [7])]))
    assert torch.isfinite(logits).all() and 0.1 < logits.float().std() < 10
    pixels = torch.zeros(1, 3, small.visual.image_size, small.visual.image_size)
    assert torch.isfinite(model.encode_images(pixels)).all()
