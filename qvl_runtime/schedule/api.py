"""The parameters and results of a request: sampling parameters, pieces of a stream, the completion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.config.checks import LARGEST_FLOAT32, LARGEST_INT, SMALLEST_FLOAT32
from qvl_runtime.errors import PromptError, SamplingError
from qvl_runtime.prompt.box_rules import BoxRules, rules_of
from qvl_runtime.prompt.boxes import Box
from qvl_runtime.schedule import guide_checks as guides
from qvl_runtime.schedule import parameter_checks as check

if TYPE_CHECKING:
    from PIL import Image

    from qvl_runtime.config.generation import GenerationDefaults
    from qvl_runtime.prompt.images import LoadedImage


MAX_ANSWERS = 128  # n, as in the API that it follows; more are more requests, which share the prompt's cached blocks
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 128, 1000  # those of generation_config.json included

_WHOLE: dict[str, tuple[int, int, str]] = {
    "max_tokens": (1, LARGEST_INT, "at least 1, up to 2^63 - 1"),
    "min_tokens": (0, LARGEST_INT, "0 (off) to 2^63 - 1"),
    "top_k": (0, LARGEST_INT, "0 (off) to 2^63 - 1"),
    "seed": (0, LARGEST_INT, "0 to 2^63 - 1"),
    "n": (1, MAX_ANSWERS, f"1 to {MAX_ANSWERS} answers: make more requests for more"),
    "logprobs": (0, 100, "0 to 100 alternatives"),
    "prompt_logprobs": (0, 100, "0 to 100 alternatives"),
    "logprob_start": (0, LARGEST_INT, "the index of a token"),
}
_REAL: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, LARGEST_FLOAT32, "0 (greedy) or more, up to 3.4e38"),
    "top_p": (SMALLEST_FLOAT32, 1.0, "at least 1.2e-38 and at most 1"),
    "min_p": (0.0, 1.0, "0 (off) to 1"),
    "repetition_penalty": (SMALLEST_FLOAT32, LARGEST_FLOAT32, "at least 1.2e-38 and at most 3.4e38; 1 is off"),
    "presence_penalty": (-2.0, 2.0, "-2 to 2; 0 is off"),
    "frequency_penalty": (-2.0, 2.0, "-2 to 2; 0 is off"),
    "timeout_s": (SMALLEST_FLOAT32, LARGEST_FLOAT32, "a number of seconds above 0"),
}
# None is no value of these.
_REQUIRED = ("n", "logprob_start", "min_tokens", "min_p", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled and when an answer stops. None means the value of the checkpoint's generation_config.json.

    temperature 0 is greedy. top_k 0 is off. `n` answers, at most 128, share one prefill; answer i is sampled with
    seed + i. `stop` strings, at most 128 of up to 1,000 characters, are not part of the text. Nothing ends an answer
    before it has `min_tokens` tokens: those that would are forbidden, and stop strings are not looked for. A
    `logit_bias` of -inf forbids a token. `presence_penalty` is subtracted from the logit of each token that the answer
    already has, and `frequency_penalty` for each time that it has it, as OpenAI's API defines them: unlike
    `repetition_penalty`, they do not count the prompt. `logprobs` is the number of alternatives returned for each
    token, and `prompt_logprobs` for each token of the prompt. With a seed, the answer does not depend on other
    requests. Requests with different `cache_salt` share no cached prefixes, so that timing does not tell one tenant
    what another has sent.

    Numbers may be those of numpy. They are sampled with as float32. Raises `SamplingError` for a value that has another
    type or is out of range as a float32.
    """

    max_tokens: int | None = None  # of the answer
    min_tokens: int = 0  # of the answer
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0  # drop tokens less likely than this fraction of the likeliest
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: from the system's entropy
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_start: int = 0  # `prompt_logprobs` are those of the tokens from this one on; the prefix may be cached
    ignore_eos: bool = False  # for profiling: only `stop` and `stop_token_ids` end it, no token or string of the model
    end_of_text_only: bool = False  # of the model's own, only <|endoftext|> ends it, not the end of a chat turn
    timeout_s: float | None = None  # from submission; an unfinished answer then ends with reason "deadline"
    cache_salt: str = ""
    # What the answer follows, one of these. All but the boxes need llguidance: pip install 'qvl-runtime[guided]'.
    json_schema: Mapping[str, Any] | str | None = None  # an object, or its JSON text; becomes text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # of the whole answer, in the syntax of Rust's regex crate; \d is 0 to 9
    choice: tuple[str, ...] | None = None  # one of these
    grammar: str | None = None  # a context-free grammar in llguidance's form of Lark
    boxes: str | BoxRules | None = None  # "force": boxes and nothing else; "allow": free text, in it boxes that parse
    adapter: str | None = None  # the name of one of the engine's LoRA adapters; None: the base model

    def __post_init__(self) -> None:
        for name, (least, most, expected) in _WHOLE.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                self._set(name, check.whole(name, value, least, most, expected))
        for name, (low, high, expected) in _REAL.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                self._set(name, check.real(name, value, low, high, expected))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; expected no more")
        self._set("stop", check.stop_strings(self.stop, MAX_STOP_STRINGS, MAX_STOP_LENGTH))
        self._set("stop_token_ids", check.ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", check.biases(self.logit_bias))
        self._set("ignore_eos", check.flag("ignore_eos", self.ignore_eos))
        self._set("end_of_text_only", check.flag("end_of_text_only", self.end_of_text_only))
        self._set("json_schema", guides.schema(self.json_schema))
        self._set("json_object", check.flag("json_object", self.json_object))
        for name in ("regex", "grammar"):
            self._set(name, guides.text(name, getattr(self, name)))
        self._set("choice", guides.choice(self.choice))
        if self.boxes is not None:
            rules_of(self.boxes)
        guides.only_one(self)
        self._set("cache_salt", check.text("cache_salt", self.cache_salt))
        if self.adapter is not None:
            self._set("adapter", check.text("adapter", self.adapter))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def resolve(self, defaults: GenerationDefaults) -> SamplingParams:
        """Return the parameters with every None filled in from generation_config.json, except the seed.

        The file's stop strings and suppressed tokens are added; a bias of these parameters counts for its token.
        """
        greedy, suppressed = not defaults.do_sample, defaults.suppressed_ids
        return replace(
            self,
            stop=self.stop if self.ignore_eos or self.end_of_text_only else (*self.stop, *defaults.stop_strings),
            logit_bias={**dict.fromkeys(suppressed, -math.inf), **self.logit_bias} if suppressed else self.logit_bias,
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
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of the tokens after the first, or from `logprob_start` on
    images: tuple[LoadedImage, ...] = field(default=(), repr=False)
    alternatives: tuple[Completion, ...] = ()  # the other answers, if n > 1

    def draw(self, image_index: int | None = None, font: str | PathLike[str] | None = None) -> Image.Image:
        """Return the image, by default the last, with this answer's boxes drawn on it.

        font: a file; by default an installed font that has the labels' glyphs. Raises `PromptError` if the prompt had
        no such image, and `ConfigError` for a font that cannot be read.
        """
        from qvl_runtime.prompt.drawing import draw_boxes

        if not self.images:
            raise PromptError("there is no image to draw on: the prompt had none")
        index = len(self.images) - 1 if image_index is None else image_index
        if not 0 <= index < len(self.images):
            raise PromptError(f"image_index is {index}; the prompt had {len(self.images)} images, counted from 0")
        boxes = [box for box in self.boxes if box.image_index in (None, index)]
        return draw_boxes(self.images[index].original, boxes, font)

    @cached_property
    def answers(self) -> tuple[Completion, ...]:
        """All n answers: this one and its alternatives."""
        return (self, *self.alternatives)


class StreamPiece(NamedTuple):
    """The next part of an answer; its last piece carries the completion."""

    text: str
    token_ids: tuple[int, ...] = ()
    completion: Completion | None = None
    answer: int = 0  # which of n, from 0
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if requested
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with the first piece of an answer, if requested
    boxes: tuple[Box, ...] = ()  # that this text closes; those of an answer that breaks off are in its completion only
