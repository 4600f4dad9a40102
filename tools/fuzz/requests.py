"""What comes in requests: images, prompts, sampling parameters and the records of a batch."""

from __future__ import annotations

import io
import json
import random
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import QVLError
from qvl_runtime.prompt.images import load_image
from qvl_runtime.schedule.api import SamplingParams
from tools.fuzz import values
from tools.fuzz.harness import Case, Failure, Target

FEW = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
INNOCENT = {"token_ids": [5, 6, 7]}
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")
USUAL: dict[str, tuple[Any, ...]] = {  # values that are usually right, and those next to them
    "max_tokens": (1, 2, 5, None, 0),
    "min_tokens": (0, 1, 4, 10**6),
    "presence_penalty": (0.0, 1.5, -2.0, 2.1),
    "frequency_penalty": (0.0, 0.3, -2.0, float("nan")),
    "temperature": (0.0, 1.0, 0.5, 1e-300, 1e30, 100.0),
    "top_p": (1.0, 0.5, 1e-12, 1e-46, 0.999999),
    "top_k": (0, 1, 50, 10**6),
    "min_p": (0.0, 0.5, 1.0, 1e-46),
    "repetition_penalty": (1.0, 1.2, 0.5, 1e-46, 1e38),
    "seed": (0, 7, 2**63 - 1, -1, None),
    "stop": ((), ("a",), ("the", "。"), ("",)),
    "stop_token_ids": ((), (5,), (896, 898), (10**6,)),
    "n": (1, 2, 3, 0),
    "logit_bias": ({}, {5: 100.0}, {5: float("-inf")}, {5: float("inf")}, {5: 1e308}),
    "logprobs": (None, 0, 5, 10**6),
    "ignore_eos": (True, False),
    "end_of_text_only": (True, False),
    "timeout_s": (None, 10.0, 1e-9),
    "json_schema": (None, {"type": "integer"}, '{"type": "object"}', "{", {"not": {}}, 7),
    "json_object": (False, True),
    "regex": (None, "[a-c]{2,5}", "(", ""),
    "choice": (None, ("yes", "no"), (), ("",)),
    "grammar": (None, 'start: "a" | "b" start', "start: x"),
    "boxes": (None, "force", "allow", "all"),
    "adapter": (None, "a", "", 5),
    "logprob_start": (None, 0, 3, -1, 10**6),
    "cache_salt": ("", "a", "\ud800"),
}
ROLES = ("user", "assistant", "system", "tool", "")


def _engine() -> Engine:
    return Engine(dtype="float32", max_model_len=256, allow_urls=False, allow_files=False, max_step_tokens=128)


def _pictures() -> list[bytes]:
    """Small images of each format, and of odd modes."""
    pictures = []
    for i, name in enumerate(FORMATS):
        for mode in ("RGB", "L", "1", "P", "RGBA", "I;16"):
            file = io.BytesIO()
            try:
                Image.effect_noise((24 + i, 17), 50).convert("L").convert(mode).save(file, name)
            except (OSError, ValueError):
                continue
            pictures.append(file.getvalue())
    return pictures


def images() -> Case:
    """Damaged images of every format that is read."""
    pictures = _pictures()

    def case(rng: random.Random) -> None:
        data = values.damaged_bytes(rng, rng.choice(pictures))
        if rng.random() < 0.1:
            data = rng.choice([b"", rng.randbytes(50), data[: rng.randrange(20)], b"GIF89a" + rng.randbytes(40)])
        pixels = load_image(data, 448).rgb
        if pixels.shape != (448, 448, 3):
            raise Failure(f"the pixels have the shape {pixels.shape}")

    return case


def _part(rng: random.Random, pictures: list[bytes]) -> Any:
    kind = rng.randrange(9)
    picture = rng.choice(pictures) if rng.random() < 0.8 else values.damaged_bytes(rng, rng.choice(pictures))
    if kind < 2:
        return {"text": rng.choice(values.TEXTS)}
    if kind == 2:
        return {"image": picture}
    if kind == 3:
        return {"type": "image_url", "image_url": {"url": rng.choice(values.TEXTS)}}
    if kind == 4:
        return {"box": values.value(rng, 2), "ref": rng.choice(values.TEXTS)}
    if kind == 5:
        return {"quad": values.value(rng, 2)}
    if kind == 6:
        return values.value(rng)
    return {"type": "text", "text": rng.choice(values.TEXTS)}


def _prompt(rng: random.Random, pictures: list[bytes]) -> Any:
    kind = rng.randrange(5)
    parts = [_part(rng, pictures) for _ in range(rng.randrange(5))]
    if kind == 0:
        return "".join(rng.choice(values.TEXTS) for _ in range(4))
    if kind == 1:
        return parts
    if kind == 2:
        ids = [rng.choice([1, 5, 1000, -1, 10**9, 3.5, None, True]) if rng.random() < 0.1 else rng.randrange(800)]
        return {"token_ids": ids * rng.randrange(20), "images": rng.choice([[], [rng.choice(pictures)], 5, None])}
    if kind == 3:
        content: Any = parts if rng.random() < 0.5 else rng.choice([*values.TEXTS, None, 5])
        return [{"role": rng.choice(ROLES), "content": content} for _ in range(rng.randrange(4))]
    return values.value(rng)


def prompts() -> Case:
    """Random prompts, messages and parts: encoded and answered."""
    engine, pictures = _engine(), _pictures()

    def case(rng: random.Random) -> None:
        prompt = _prompt(rng, pictures)
        completion = engine.chat(prompt, FEW) if rng.random() < 0.3 else engine.generate([prompt], FEW)[0]
        if not completion.token_ids:
            raise Failure("the answer has no tokens")

    return case


def _params(rng: random.Random) -> dict[str, Any]:
    names = [field.name for field in fields(SamplingParams)]
    chosen: dict[str, Any] = {"max_tokens": 3}
    for name in rng.sample(names, rng.randrange(1, 4)):
        usual = name in USUAL and rng.random() < 0.7
        chosen[name] = rng.choice(USUAL[name]) if usual else values.value(rng, 1)
    if rng.random() < 0.4:
        chosen["logit_bias"] = {rng.choice([1, 5, 896, -1, 10**6, "7"]): rng.choice(values.NUMBERS) for _ in range(3)}
    if rng.random() < 0.1:
        chosen["logit_bias"] = dict.fromkeys(range(1152), float("-inf"))
    return chosen


def parameters() -> Case:
    """Random sampling parameters, with an innocent request in the same steps."""
    engine = _engine()
    expected = engine.generate([INNOCENT], FEW)[0].token_ids

    def case(rng: random.Random) -> None:
        chosen = SamplingParams(**_params(rng))
        if (chosen.n or 1) > 8 or (chosen.max_tokens or 0) > 64:
            return
        try:
            completions: Any = engine.generate([INNOCENT, {"token_ids": [9, 8]}], [FEW, chosen])
        except QVLError as error:
            if error.completions is None:  # refused before any was submitted
                raise
            completions = error.completions
        if completions[0].token_ids != expected:
            raise Failure("another request changed the answer")
        if isinstance(completions[1], QVLError):
            raise completions[1]

    return case


def records() -> Case:
    """Files of damaged batch records: each line is answered or has its error, and a rerun adds nothing."""
    from qvl_runtime.cli.batch import run_batch

    engine, pictures = _engine(), _pictures()

    def line(rng: random.Random) -> bytes:
        record: Any = rng.choice([
            {"prompt": rng.choice(values.TEXTS), "id": values.value(rng, 1)},
            {"raw": _jsonable(_prompt(rng, pictures)), "params": {"max_tokens": 2}},
            {"messages": [{"role": "user", "content": rng.choice(values.TEXTS)}], "params": _jsonable(_params(rng))},
        ])  # fmt: skip
        if rng.random() < 0.5:
            record = values.damaged(rng, record)
        return values.encoded(rng, record).replace(b"\n", b" ")

    def case(rng: random.Random) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source, target = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
            lines = [json.dumps({"raw": {"token_ids": [1, 2]}}).encode()]
            lines += [line(rng) for _ in range(rng.randrange(1, 8))]
            source.write_bytes(b"\n".join(lines) + b"\n")
            for _ in run_batch(engine, source, target, FEW):
                pass
            answers = target.read_bytes()
            for answer in answers.splitlines():
                json.loads(answer)
            for _ in run_batch(engine, source, target, FEW):
                pass
            if target.read_bytes() != answers:
                raise Failure("a rerun of a finished batch changed its answers")

    return case


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda other: "picture", skipkeys=True))


TARGETS = (
    Target("images", images),
    Target("prompts", prompts),
    Target("parameters", parameters),
    Target("records", records),
)
