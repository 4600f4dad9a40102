"""From completions to OpenAI's objects: usage, finish reasons, boxes, timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_runtime.prompt.boxes import Box
    from qvl_runtime.prompt.images import LoadedImage
    from qvl_runtime.schedule.api import Completion, Timings

Json = dict[str, Any]


def finish_reason(completion: Completion) -> str:
    """OpenAI's reason for the end of an answer; a deadline is a limit like that on tokens."""
    return "length" if completion.finish_reason == "deadline" else completion.finish_reason


def request_usage(answers: Sequence[Completion]) -> Json:
    """The usage of one prompt with n answers: the prompt counts once."""
    usage, completed = answers[0].usage, sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completed,
        "total_tokens": usage.prompt_tokens + completed,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
    }


def sum_usages(prompts: Sequence[Sequence[Completion]], answered: bool = True) -> Json:
    """The usage of several prompts, each with its answers. answered: whether these count."""
    usages = [request_usage(answers) for answers in prompts]
    total = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    details = {"cached_tokens": 0, "image_tokens": 0}
    for usage in usages:
        completed = usage["completion_tokens"] if answered else 0
        total["prompt_tokens"] += usage["prompt_tokens"]
        total["completion_tokens"] += completed
        total["total_tokens"] += usage["prompt_tokens"] + completed
        for name in details:
            details[name] += usage["prompt_tokens_details"][name]
    return {**total, "prompt_tokens_details": details}


def timings_json(timings: Timings) -> Json:
    """Where the time of an answer went, in seconds, and its speed."""
    return {
        "queue_s": round(timings.queue_s, 6),
        "image_s": round(timings.image_s, 6),
        "vision_s": round(timings.vision_s, 6),
        "prefill_s": round(timings.prefill_s, 6),
        "decode_s": round(timings.decode_s, 6),
        "ttft_s": round(timings.ttft_s, 6),
        "prefill_tokens_per_s": round(timings.prefill_tokens_per_s, 3),
        "decode_tokens_per_s": round(timings.decode_tokens_per_s, 3),
    }


def box_json(box: Box, images: Sequence[LoadedImage]) -> Json:
    """A box on the grid of 1000, and in pixels of the image that it belongs to."""
    image = None
    if images:
        image = images[-1 if box.image_index is None else box.image_index]
    return {
        "label": box.label,
        "box": [box.x1, box.y1, box.x2, box.y2],
        "quad": None if box.quad is None else [list(point) for point in box.quad],
        "score": box.score,
        "image_index": box.image_index,
        "span": None if box.span is None else list(box.span),
        "pixels": None if image is None else list(box.pixels(image.width, image.height)),
        "details": None if box.details is None else asdict(box.details),
    }


def pictures_json(images: Sequence[LoadedImage]) -> list[Json]:
    """The size of each image of the prompt, in pixels, as the model's boxes count them."""
    return [{"width": image.width, "height": image.height} for image in images]


def qvl_json(completion: Completion) -> Json:
    """What an answer has beyond OpenAI's fields: its boxes, the images that they are on, the exact finish reason."""
    return {
        "boxes": [box_json(box, completion.images) for box in completion.boxes],
        "pictures": pictures_json(completion.images),
        "finish_reason": completion.finish_reason,
    }
