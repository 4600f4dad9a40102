"""Memory by computation: the floors of full-size models, and what a real step on a CPU agrees with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.finetune.memory import _Live, training_memory
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.weights.synthetic import synthetic_config

pytestmark = pytest.mark.unit
BASE = FinetuneOptions(lora=AdapterConfig(modules_to_save=("wte", "lm_head")), masters="bfloat16")
# Options, model, tokens, and the floor in 10^9 bytes; the published figures are 23.3, 27.3, 17.0, 19.3 and 38.7.
FLOORS = [
    (FinetuneOptions(), "qwen-vl-chat", 384, 22.0),
    (FinetuneOptions(), "qwen-vl-chat", 2048, 23.0),
    (FinetuneOptions(method="qlora"), "qwen-vl-chat-int4", 384, 13.0),
    (FinetuneOptions(method="qlora"), "qwen-vl-chat-int4", 2048, 14.0),
    (BASE, "qwen-vl-chat", 2048, 32.0),
]


@pytest.mark.parametrize(("options", "model", "tokens", "most"), FLOORS)
def test_full_size_models_stay_below_the_floors(options: FinetuneOptions, model: str, tokens: int, most: float) -> None:
    config = synthetic_config(model, ModelConfig.from_folder(NANO))
    memory = training_memory(config, options, tokens)
    assert memory.total / 1e9 <= most
    if options.method == "lora":
        assert memory.weights == pytest.approx(19.3e9, rel=0.01)


def test_checkpointing_saves_activations_and_layers_add_the_same() -> None:
    config = ModelConfig.from_folder(NANO)
    kept, recomputed = (training_memory(config, FinetuneOptions(checkpointing=on), 1024).step for on in (False, True))
    assert recomputed < kept / 2
    steps = [
        training_memory(replace(config, num_hidden_layers=n), FinetuneOptions(checkpointing=False), 1024).step
        for n in (4, 8, 12)
    ]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], rel=0.01)


def test_storages_are_counted_while_they_live() -> None:
    with torch.device("meta"), _Live([]) as live:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = second + 1
    assert live.peak == 8000 - 2000 and live.now == 4000
    del second, third
    assert live.now == 0
