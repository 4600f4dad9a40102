"""Options of the engine: what is out of range is named."""

from __future__ import annotations

from typing import Any

import numpy as np
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
        ({"max_image_bytes": 2**63 - 1}, ["max_image_bytes is 9223372036854775807", "at most 1,099,511,627,776"]),
        ({"max_image_pixels": 1e13}, ["max_image_pixels is 10000000000000", "at most"]),
        ({"image_timeout_s": 1e20}, ["image_timeout_s is 1e+20", "at most 1,000,000,000"]),
        ({"image_timeout_s": "10"}, ["image_timeout_s is '10'", "a number"]),
        ({"max_running": "4"}, ["max_running is '4'", "a whole number"]),
        ({"max_running": True}, ["max_running is True", "a whole number"]),
        ({"max_running": None}, ["max_running is None", "a whole number"]),
        ({"max_images": 1.5}, ["max_images is 1.5", "a whole number"]),
        ({"speculative_tokens": float("nan")}, ["speculative_tokens is nan", "a whole number"]),
        ({"kv_cache_bytes": 10**400}, ["kv_cache_bytes is 1000", "63 bits"]),
        ({"prefix_caching": "no"}, ["prefix_caching is 'no'", "True or False"]),
    ],
)
def test_engine_options_out_of_range_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_engine_devices(device: str) -> None:
    assert EngineConfig(device=device, max_images=0, max_model_len=None).device == device


def test_whole_numbers_of_other_types() -> None:
    config = EngineConfig(kv_cache_bytes=4e9, max_running=np.int64(3))
    assert [type(value) for value in (config.kv_cache_bytes, config.max_running)] == [int, int]
    assert config.kv_cache_bytes == 4 * 10**9 and config.max_running == 3
