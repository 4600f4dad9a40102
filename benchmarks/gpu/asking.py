"""Prompts for the suite's engines, and the time that their answers take."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.place import Place
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.schedule.request import Request

IMAGE_TOKENS = 258
WARMED = 8  # tokens of an engine's first prompt, fewer than the smallest graph of prompts
VARIETY = 1000  # token ids that texts are made of


def text(length: int, seed: int) -> dict[str, Any]:
    """A prompt of `length` tokens whose first token differs between seeds, so that no prefix is shared."""
    return {"token_ids": [2 + seed % VARIETY, *[2 + (7 * i + seed) % VARIETY for i in range(length - 1)]]}


def with_picture(engine: Engine, length: int, seed: int, picture: int) -> dict[str, Any]:
    """A prompt of a picture and a text that fill `length` tokens. Equal `picture`s are the same picture."""
    marks = (engine.tokenizer.img_start, engine.tokenizer.img_end)
    pixels = np.random.default_rng(picture).integers(0, 256, (448, 448, 3), np.uint8)
    ids = text(length - IMAGE_TOKENS, seed)["token_ids"]
    return {"token_ids": [*marks, *ids], "images": [Image.fromarray(pixels)]}


def submit(engine: Engine, prompts: list[dict[str, Any]], tokens: int) -> list[Request]:
    """Submit prompts for greedy answers of exactly `tokens` tokens, and run until each has its first."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    submitted = [engine.submit(engine.encode(prompt), params) for prompt in prompts]
    while any(not request.branches or not request.branches[0].output.token_ids for request in submitted):
        if not engine.core.step():
            raise RuntimeError("the engine has no work left, but a request has no token yet")
    return submitted


def finish(engine: Engine) -> None:
    """Run until all answers are complete."""
    while engine.core.step():
        pass


def tokens_per_second(engine: Engine, prompts: list[dict[str, Any]], tokens: int) -> float:
    """Tokens a second of all answers together, after the first token of each."""
    submitted = submit(engine, prompts, tokens)
    began = time.perf_counter()
    made = -sum(len(request.branches[0].output.token_ids) for request in submitted)
    finish(engine)
    made += sum(len(request.completion().token_ids) for request in submitted)
    return made / (time.perf_counter() - began)


def first_token_seconds(place: Place, engine: Engine, prompt: dict[str, Any]) -> float:
    """Seconds from submitting a prompt to its first token, which is also its last."""
    place.wait()
    began = time.perf_counter()
    submit(engine, [prompt], 1)
    finish(engine)
    place.wait()
    return time.perf_counter() - began
