"""Options of the engine: what is out of range is named."""

from __future__ import annotations

from typing import Any

import pytest

from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, ["'tpu'", "'cuda:N'"]),
        ({"device": "cuda:x"}, ["'cuda:x'"]),
        ({"dtype": "int8"}, ["'int8'", "'bfloat16'"]),
        ({"max_model_len": 0}, ["max_model_len"]),
        ({"max_image_bytes": -1}, ["max_image_bytes is -1"]),
        ({"max_image_pixels": 0}, ["max_image_pixels"]),
        ({"image_timeout_s": float("inf")}, ["image_timeout_s"]),
        ({"max_images": -1}, ["max_images"]),
    ],
)
def test_engine_options_out_of_range_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_engine_devices(device: str) -> None:
    assert EngineConfig(device=device, max_images=0, max_model_len=None).device == device
