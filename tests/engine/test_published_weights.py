"""A published checkpoint loads, answers a chat about the demo image, and returns a box inside the image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.cli.options import user_message

FOLDER = os.environ.get("QVL_WEIGHTS", "")
if not FOLDER:
    pytest.skip("set QVL_WEIGHTS to the folder of a published checkpoint", allow_module_level=True)

pytestmark = [pytest.mark.weights, pytest.mark.timeout(3600)]
MAX_TOKENS = 48


def test_a_chat_about_the_demo_image() -> None:
    engine = Engine(Path(FOLDER), max_model_len=1024)
    plan, params = DemoPlan.from_folder(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    question = [user_message(plan.question, [str(plan.image)])]
    answer = engine.chat(question, params)
    usage = answer.usage
    assert answer.text.strip() and 0 < usage.completion_tokens == len(answer.token_ids) <= MAX_TOKENS
    assert (usage.images, usage.image_tokens) == (1, engine.config.visual.n_queries)
    assert usage.image_tokens < usage.prompt_tokens < usage.image_tokens + 100
    assert engine.chat(question, params).token_ids == answer.token_ids, "greedy answers repeat"

    boxed = engine.chat([user_message(plan.box_prompt, [str(plan.image)])], params)
    assert boxed.boxes, boxed.text
    (image,) = boxed.images
    width, height = image.original.size
    for box in boxed.boxes:
        left, top, right, bottom = box.pixels(width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
