"""generation_config.json gives the defaults of every request; what is not supported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import ConfigError


def test_generation_defaults_without_a_file_are_the_released_ones(tmp_path: Path) -> None:
    defaults = GenerationDefaults.from_folder(tmp_path)
    assert defaults == GenerationDefaults()
    assert (defaults.chat_format, defaults.do_sample, defaults.top_p, defaults.top_k) == ("chatml", True, 0.5, 0)
    assert (defaults.max_window_size, defaults.max_new_tokens, defaults.eos_token_id) == (6144, 512, None)


def test_generation_config_of_the_base_model(tmp_path: Path) -> None:
    raw = {"chat_format": "raw", "do_sample": True, "eos_token_id": 151643, "max_new_tokens": 512}
    raw |= {"pad_token_id": 151643, "stop_words_ids": [[151643]], "top_k": 0, "top_p": 0.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    defaults = GenerationDefaults.from_folder(tmp_path)
    assert (defaults.chat_format, defaults.top_p, defaults.top_k, defaults.pad_token_id) == ("raw", 0.3, 0, 151643)


def test_keys_that_transformers_left_out_mean_its_defaults() -> None:
    """It saves only what differs from them: a file without do_sample was saved with do_sample false."""
    defaults = GenerationDefaults.from_dict({"chat_format": "chatml", "eos_token_id": 7})
    assert (defaults.do_sample, defaults.top_k, defaults.top_p) == (False, 50, 1.0)
    assert (defaults.temperature, defaults.repetition_penalty) == (1.0, 1.0)


@pytest.mark.parametrize("listed", [[7], 7])
def test_one_end_id_may_stand_in_a_list(listed: Any) -> None:
    assert GenerationDefaults.from_dict({"eos_token_id": listed}).eos_token_id == 7


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"chat_format": "alpaca"}, ["chat_format", "'alpaca'", "'raw'"]),
        ({"num_beams": 4}, ["num_beams 4"]),
        ({"temperature": -1}, ["temperature -1"]),
        ({"top_p": 0}, ["top_p 0"]),
        ({"top_k": -1}, ["top_k -1"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
        ({"max_new_tokens": "many"}, ["max_new_tokens", "'many'"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id", "[1, '2']"]),
    ],
)
def test_generation_config_faults_are_named(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationDefaults.from_dict(raw)
    assert all(word in str(caught.value) for word in words), str(caught.value)
