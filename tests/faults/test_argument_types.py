"""Arguments of the wrong type, in Python: one line that names the argument and what is expected, never a bare error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qvl_runtime import Engine
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.errors import ConfigError, PromptError, QVLError

pytestmark = pytest.mark.cpu
NO_LIST: list[Any] = [None, 5, 2.5, True, b"x", {"a": 1}, {1, 2}, object(), np.zeros(3), torch.zeros(2), 10**400]
NO_TEXT: list[Any] = [5, 2.5, True, b"x", [], {}, object(), np.zeros(3), torch.zeros(2), 10**400]
PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=1024)


def kind(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", NO_LIST, ids=kind)
def test_lists(engine: Engine, value: Any) -> None:
    with pytest.raises(PromptError, match=r"^options is .*; expected a list of strings"):
        engine.choose("hi", value)
    with pytest.raises(PromptError, match=r"^boxes is .*; expected a list of boxes"):
        engine.score_boxes(PICTURE, "red", value)
    with pytest.raises(PromptError, match=r"^continuations is .*; expected a list of texts or lists of token ids"):
        engine.score_continuations("hi", value)


@pytest.mark.parametrize("value", NO_TEXT, ids=kind)
def test_questions(engine: Engine, value: Any) -> None:
    with pytest.raises(PromptError, match=r"^the question is .*; expected text"):
        engine.locate(PICTURE, "red", question=value)


@pytest.mark.parametrize("value", NO_TEXT, ids=kind)
def test_what_an_engine_is_made_of(value: Any) -> None:
    with pytest.raises(QVLError, match=r"^the model is .*; expected a folder, or a hub id"):
        Engine(value)
    with pytest.raises(ConfigError, match=r"^source is .*; supported are"):
        Engine(source=value)
    for name in ("dtype", "precision", "kv_dtype", "transparency", "exif_orientation", "deep_pixels"):
        with pytest.raises(ConfigError, match=rf"^{name} is "):
            EngineConfig(**{name: value})


@pytest.mark.parametrize("value", [5, "x", [], [None], {1, 2}, np.zeros(3)], ids=kind)
def test_adapters(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^adapters is .*; expected a dict"):
        Engine(adapters=value)
    with pytest.raises(ConfigError, match=r"^adapter 'mine' is .*; expected the folder"):
        Engine(adapters={"mine": [value]})  # type: ignore[dict-item]
