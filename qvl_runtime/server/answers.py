"""From completions to OpenAI's objects: usage, finish reasons, boxes, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl_runtime.prompt.streaming import StreamDecoder

if TYPE_CHECKING:
    from qvl_runtime.prompt.boxes import Box
    from qvl_runtime.prompt.images import LoadedImage
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import Completion, Timings, TokenLogprob, Usage

LOWEST = -9999.0  # for a token of probability 0: JSON has no infinity, and OpenAI uses this
Json = dict[str, Any]


def finish_reason(completion: Completion) -> str:
    """OpenAI's reason for the end of an answer; a deadline is a limit like that on tokens."""
    return "length" if completion.finish_reason == "deadline" else completion.finish_reason


def usage_json(usages: Sequence[Usage]) -> Json:
    """The usage of one or more prompts with their answers."""
    prompt, answer = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    details = {
        "cached_tokens": sum(u.cached_tokens for u in usages),
        "image_tokens": sum(u.image_tokens for u in usages),
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": details,
    }


def request_usage(answers: Sequence[Completion]) -> Json:
    """The usage of one prompt with n answers: the prompt counts once."""
    usage = usage_json([answers[0].usage])
    usage["completion_tokens"] = sum(answer.usage.completion_tokens for answer in answers)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return usage


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


class Logprobs:
    """Log probabilities of the tokens whose text is shown: one that only a stop string or the end needed is not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer)
        self._waiting: list[tuple[int, TokenLogprob]] = []  # with the character that each begins at
        self._decoded = self._shown = 0  # characters

    def add(self, text: str, entries: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """Take the next tokens and the text that is shown with them; returns those that are shown now."""
        for entry in entries:
            self._waiting.append((self._decoded, entry))
            self._decoded += len(self._decoder.feed(entry.token_id))
        self._shown += len(text)
        ready = [entry for start, entry in self._waiting if start < self._shown]
        del self._waiting[: len(ready)]
        return ready

    def chat(self, entries: Sequence[TokenLogprob]) -> Json:
        """OpenAI's form in chat answers."""
        content = [
            {**self._token(e.token_id, e.logprob), "top_logprobs": [self._token(*alternative) for alternative in e.top]}
            for e in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        data = token_bytes(self._tokenizer, token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": bounded(logprob), "bytes": list(data)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token; none for a padding row of the model."""
    return tokenizer.token_bytes(token_id) if 0 <= token_id < tokenizer.n_vocab else b""


def bounded(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(logprob, LOWEST) if not math.isnan(logprob) else LOWEST
