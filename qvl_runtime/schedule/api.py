"""The parameters and results of a request: sampling parameters, pieces of a stream, the completion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.errors import PromptError, SamplingError
from qvl_runtime.prompt.boxes import Box

if TYPE_CHECKING:
    from PIL import Image

    from qvl_runtime.config.generation import GenerationDefaults
    from qvl_runtime.prompt.images import LoadedImage


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled and when an answer stops. None means the value of the checkpoint's generation_config.json.

    temperature 0 is greedy. top_k 0 is off. `n` answers share one prefill; answer i is sampled with seed + i. `stop`
    strings are not part of the text. `logprobs` is the number of alternatives returned for each token. With a seed,
    the answer does not depend on other requests. Requests with different `cache_salt` share no cached prefixes, so that
    timing does not tell one tenant what another has sent. Raises `SamplingError` for a value out of range.
    """

    max_tokens: int | None = None  # of the answer
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0  # drop tokens less likely than this fraction of the likeliest
    repetition_penalty: float | None = None
    seed: int | None = None  # None: from the system's entropy
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False  # for profiling: only `stop` and `stop_token_ids` end it, no token or string of the model
    timeout_s: float | None = None  # from submission; an unfinished answer then ends with reason "deadline"
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_types()
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _check(
            "temperature", self.temperature, _is_none_or_between(self.temperature, 0, math.inf), "0 (greedy) or more"
        )
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1")
        _check("top_k", self.top_k, _is_none_or_between(self.top_k, 0, math.inf), "0 (off) or more")
        _check("min_p", self.min_p, _is_none_or_between(self.min_p, 0, 1), "0 (off) to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty is None or 0 < penalty < math.inf, "more than 0; 1 is off")
        _check("seed", self.seed, _is_none_or_between(self.seed, 0, 2**63 - 1), "0 or more")
        _check("n", self.n, self.n >= 1, "at least 1")
        _check("logprobs", self.logprobs, _is_none_or_between(self.logprobs, 0, 100), "0 to 100 alternatives")
        timeout = self.timeout_s
        _check("timeout_s", timeout, timeout is None or 0 < timeout < math.inf, "a number of seconds above 0")
        _check("stop", self.stop, all(self.stop), "strings of at least one character")

    def _check_types(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "n", "logprobs"):
            value = getattr(self, name)
            _check(name, value, (value is None and name != "n") or _is_integer(value), "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "timeout_s"):
            value = getattr(self, name)
            _check(name, value, (value is None and name != "min_p") or _is_number(value), "a number")
        texts = isinstance(self.stop, (tuple, list)) and all(isinstance(text, str) for text in self.stop)
        _check("stop", self.stop, texts, "strings")
        ids = isinstance(self.stop_token_ids, (tuple, list)) and all(map(_is_integer, self.stop_token_ids))
        _check("stop_token_ids", self.stop_token_ids, ids, "whole numbers")
        bias = self.logit_bias
        known = isinstance(bias, Mapping) and all(map(_is_integer, bias)) and all(map(_is_number, bias.values()))
        _check("logit_bias", bias, known and all(v < math.inf for v in bias.values()), "token ids to finite numbers")

    def resolve(self, defaults: GenerationDefaults) -> SamplingParams:
        """Return the parameters with every None filled in from generation_config.json, except the seed.

        The file's stop strings and suppressed tokens are added; a bias of these parameters counts for its token.
        """
        greedy = not defaults.do_sample
        return replace(
            self,
            stop=self.stop if self.ignore_eos else (*self.stop, *defaults.stop_strings),
            logit_bias={**dict.fromkeys(defaults.suppressed_ids, -math.inf), **self.logit_bias},
            timeout_s=defaults.max_time if self.timeout_s is None else self.timeout_s,
            max_tokens=defaults.max_new_tokens if self.max_tokens is None else self.max_tokens,
            temperature=(0.0 if greedy else defaults.temperature) if self.temperature is None else self.temperature,
            top_p=(1.0 if greedy else defaults.top_p) if self.top_p is None else self.top_p,
            top_k=(0 if greedy else defaults.top_k) if self.top_k is None else self.top_k,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
        )


class TokenLogprob(NamedTuple):
    """Natural logarithm of a token's probability under the model's own distribution, before penalties and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens with theirs, if requested


@dataclass(frozen=True, slots=True)
class Usage:
    """Token and image counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int  # of the prompt
    images: int
    cached_tokens: int = 0  # of the prompt: found in the prefix cache

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock times of a request, in seconds."""

    image_s: float  # reading, decoding and resizing images, and tokenizing the prompt
    vision_s: float  # the vision encoder; 0 if features were cached
    prefill_s: float
    decode_s: float  # from the first token to the last
    prompt_tokens: int  # of the prompt, computed rather than cached
    decoded_tokens: int  # tokens after the first
    queue_s: float = 0.0  # from submission to the first step

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.image_s + self.queue_s + self.vision_s + self.prefill_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed prompt tokens per second of prefill; 0 if that took no time."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first per second of decoding; 0 if there are none."""
        return self.decoded_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` includes the stop id that ended it, if one did; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": a stop id or string; "length": max_tokens or the end of the context; "deadline"
    usage: Usage
    timings: Timings
    boxes: tuple[Box, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    images: tuple[LoadedImage, ...] = field(default=(), repr=False)
    alternatives: tuple[Completion, ...] = ()  # the other answers, if n > 1

    def draw(self, image_index: int | None = None) -> Image.Image:
        """Return the image, by default the last, with this answer's boxes drawn on it.

        Raises `PromptError` if the prompt had no such image.
        """
        from qvl_runtime.prompt.drawing import draw_boxes

        if not self.images:
            raise PromptError("there is no image to draw on: the prompt had none")
        index = len(self.images) - 1 if image_index is None else image_index
        if not 0 <= index < len(self.images):
            raise PromptError(f"image_index is {index}; the prompt had {len(self.images)} images, counted from 0")
        boxes = [box for box in self.boxes if box.image_index in (None, index)]
        return draw_boxes(self.images[index].original, boxes)

    @cached_property
    def answers(self) -> tuple[Completion, ...]:
        """All n answers: this one and its alternatives."""
        return (self, *self.alternatives)


class StreamPiece(NamedTuple):
    """The next part of an answer; the last piece carries the completion."""

    text: str
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_none_or_between(value: float | None, low: float, high: float) -> bool:
    return value is None or (low <= value <= high and not math.isinf(value))


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise SamplingError(f"{name} is {value!r}; expected {expected}")
