"""Whole models on the kernels: close to float32 on the CPU, and the same tokens with and without graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.place import Place
from qvl_kernels.util import dtype_name
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine.engine import NANO

Row = dict[str, Any]
GOLDENS = {  # of the original code, if the folder with them is given: file, ids, logits, and the rows they are of
    "tiny": (("lm_i_text20", "ids", "logits", None), ("lm_iv_long", "ids", "logits", None)),
    "tiny-int4": (("lm_int4", "i_ids", "i_logits", None),),
}
MODELS = (NANO, NANO.parent / "nano_int4")
WAYS: tuple[dict[str, Any], ...] = ({"graphs": True}, {"graphs": False}, {"embedding_on_host": True})
EXERCISES = [(path, options) for path in MODELS for options in WAYS]
TOGETHER = 24  # prompts that are answered in one step
ALONE = (5, 20, 60, 130)  # tokens of prompts that are answered one at a time
INTERPRETED = {"small_m": (128, 4), "dense": (64, 8)}  # columns and warps of a program, in a third of the time


def goldens(place: Place, folder: Path | None) -> Iterator[Row]:
    """Root mean square errors of logits, ours and plain torch's on the CPU in the same dtype, against float32.

    The oracle's checkpoints against what the original computes; nano and its Int4 sibling, an image in the prompt,
    against plain torch in float32. Ours may be twice plain torch's.
    """
    with large_programs(place):
        yield from _goldens(place, folder)


def _goldens(place: Place, folder: Path | None) -> Iterator[Row]:
    dtype = dtype_name(place.dtypes[-1])
    if folder is not None:
        for name, files in GOLDENS.items():
            for file, ids, logits, _ in files[: 1 if place.tiny else None]:
                want = load_file(folder / f"{file}.safetensors")
                prompt: dict[str, Any] = {"token_ids": want[ids][0].tolist()}
                yield _judged(f"{name}, {file}", folder / name, prompt, want[logits][0], dtype, place)
    for path in MODELS:
        prompt = _nano_prompt(image=not place.tiny)
        exact = _logits(path, prompt, "float32", torch.device("cpu"), "reference")
        yield _judged(path.name, path, prompt, exact, dtype, place)


def _judged(name: str, path: Path, prompt: dict[str, Any], want: Tensor, dtype: str, place: Place) -> Row:
    ours = _logits(path, prompt, dtype, place.device, None)
    plain = _logits(path, prompt, dtype, torch.device("cpu"), "reference")
    error, yardstick = (float((x.float().cpu() - want).square().mean().sqrt()) for x in (ours, plain))
    return {
        "model": name,
        "dtype": dtype,
        "rms_error": error,
        "plain_torch": yardstick,
        "right": error <= 2 * yardstick,
    }


class Answered(NamedTuple):
    """Greedy answers of one engine, and how many graphs it replayed."""

    tokens: list[tuple[int, ...]]
    replays: int
    prefill_replays: int


def graphs(place: Place) -> Iterator[Row]:
    """Greedy answers to prompts of many lengths, together and alone: with graphs, without, embedding on the host."""
    with large_programs(place):
        yield from _graphs(place)


@contextmanager
def large_programs(place: Place) -> Iterator[None]:
    """Without a GPU, give a program more outputs: the interpreter's time is that of the number of programs."""
    from qvl_kernels.triton.linear import configs

    with patch.dict(configs.FEW, INTERPRETED if place.tiny else {}):
        yield


def _graphs(place: Place) -> Iterator[Row]:
    for path in MODELS[: 1 if place.tiny else None]:
        # without a GPU there are no graphs, and the first two are one
        answers = [answered(place, path, options) for options in WAYS[:: 2 if place.tiny else 1]]
        replays = sum(one.replays for one in answers)
        prefill_replays = sum(one.prefill_replays for one in answers)
        same = all(one.tokens == answers[0].tokens for one in answers)
        yield {
            "model": path.name,
            "requests": len(answers[0].tokens),
            "replays": replays,
            "prefill_replays": prefill_replays,
            "same_tokens": same,
            "right": same and (replays > 0) == (prefill_replays > 0) == (not place.tiny),
        }


def answered(place: Place, path: Path, options: dict[str, Any]) -> Answered:
    """Answer all prompts with an engine of these options."""
    greedy = SamplingParams(max_tokens=2 if place.tiny else 32, temperature=0, ignore_eos=True)
    engine = Engine(
        path,
        device=str(place.device),
        dtype=dtype_name(place.dtypes[0]),
        max_model_len=256,
        kv_cache_bytes=64 << 20,
        max_running=TOGETHER,  # a graph for each number of rows up to it
        **options,
    )
    outputs = engine.generate([{"token_ids": [*range(1, 3 + n)]} for n in range(2 if place.tiny else TOGETHER)], greedy)
    for n in () if place.tiny else ALONE:  # a step of one prompt, which has a graph of its own
        outputs += engine.generate([{"token_ids": [*range(n, 2 * n)]}], greedy)
    runner = engine.core.runner
    replays, prefill = (0 if used is None else used.replays for used in (runner.graphs, runner.prefill_graphs))
    del engine, runner
    place.settle()
    return Answered([tuple(out.token_ids) for out in outputs], replays, prefill)


def exercise(place: Place, number: int) -> None:
    """Run what `graphs` and `goldens` run of one of `EXERCISES`."""
    path, options = EXERCISES[number]
    answered(place, path, options)
    if options is WAYS[0]:
        _logits(path, _nano_prompt(image=True), dtype_name(place.dtypes[-1]), place.device, None)


def _nano_prompt(image: bool) -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    ids = [72, 101, 108, 108, 111]
    if not image:
        return {"token_ids": ids}
    marks = _image_marks()
    return {"token_ids": [*marks, *ids], "images": [Image.fromarray(noise)]}


def _image_marks() -> tuple[int, int]:
    """The ids around an image."""
    from qvl_runtime.config.model import ModelConfig

    visual = ModelConfig.from_folder(NANO).visual
    return visual.image_start_id, visual.image_end_id


def _logits(path: Path, prompt: dict[str, Any], dtype: str, device: torch.device, kernels: str | None) -> Tensor:
    with kernels_variable(kernels):
        engine = Engine(path, device=str(device), dtype=dtype, max_model_len=512, kv_cache_bytes=64 << 20, graphs=False)
        scored = engine.score(prompt, return_logits=True).logits
    if scored is None:
        raise RuntimeError("score returned no logits, though return_logits was set")
    return scored


@contextmanager
def kernels_variable(kernels: str | None) -> Iterator[None]:
    """Set QVL_KERNELS; None leaves it unchanged."""
    before = os.environ.get("QVL_KERNELS")
    if kernels is not None:
        os.environ["QVL_KERNELS"] = kernels
    try:
        yield
    finally:
        os.environ.pop("QVL_KERNELS", None)
        if before is not None:
            os.environ["QVL_KERNELS"] = before
