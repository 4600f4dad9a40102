"""The form of completion requests and answers, without HTTP: what the server and `qvl batch` have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qvl_runtime.server.answers import Json, box_json, finish_reason, qvl_json
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.logprobs import TextLogprobs, prompt_text

if TYPE_CHECKING:
    from qvl_runtime.prompt.chatml import EncodedPrompt
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, TokenLogprob

DEFAULT_TOKENS = 16  # OpenAI's


def prompts_of(prompt: Any) -> list[Any]:
    """The prompts of a request, as the engine takes them."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], (int, float)):
        prompt = [prompt]
    return [each if isinstance(each, str) else {"token_ids": [int(token) for token in each]} for each in prompt]


def asked_logprobs(request: Mapping[str, Any]) -> dict[str, int | None]:
    """The alternatives for each token of the answer, and with `echo` of the prompt, as `SamplingParams` has them."""
    alternatives = None if (wanted := request.get("logprobs")) is None else int(wanted)
    return {"logprobs": alternatives, "prompt_logprobs": alternatives if request.get("echo") else None}


def token_limit(request: Mapping[str, Any]) -> int:
    """The longest answer that is wanted; 0 for the scores of the prompt alone. Raises `APIError` 400."""
    max_tokens = int(request.get("max_tokens", DEFAULT_TOKENS))
    if not max_tokens and (not request.get("echo") or request.get("stream")):
        raise invalid("max_tokens is 0, which needs echo: true and no stream; expected at least 1", "max_tokens")
    return max_tokens


def frame(model: str) -> Json:
    """What an answer, or each chunk of one, begins with."""
    return {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}


def choices_of(completion: Completion, begin: Callable[[], Choice], answered: bool) -> list[Json]:
    """The answers to one prompt, without their indices.

    begin: makes the choice of each. answered: whether answers are shown, and not only the scores of the prompt.
    """
    choices = []
    for answer in completion.answers:
        choice = begin()
        text = choice.begin(completion.prompt_logprobs or ())
        if answered:
            text += choice.add(answer.text, answer.logprobs or ())
            choice.end(answer)
        finish = finish_reason(answer) if answered else "length"
        choices.append(choice.json(text, finish) | {"qvl": qvl_json(answer)})
    return choices


class Choice:
    """One answer as it grows: its text, after that of the prompt with `echo`, and its log probabilities."""

    def __init__(self, tokenizer: Tokenizer, encoded: EncodedPrompt, params: SamplingParams, echo: bool) -> None:
        self._tokenizer, self._encoded, self._echo = tokenizer, encoded, echo
        self._writer = None if params.logprobs is None else TextLogprobs(tokenizer)
        self._stop_ids = encoded.stop_ids.union(params.stop_token_ids)
        self._begun = False

    def begin(self, scores: tuple[TokenLogprob, ...]) -> str:
        """The text before the answer; scores: of the prompt."""
        self._begun = True
        if not self._echo:
            return ""
        token_ids = self._encoded.token_ids
        if self._writer is not None:
            self._writer.prompt(token_ids, scores)
        return prompt_text(self._tokenizer, token_ids)

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> str:
        """Take the next tokens of the answer, and return their text."""
        if self._writer is not None:
            self._writer.add(text, logprobs)
        return text

    def end(self, completion: Completion) -> None:
        """Take the token that ended the answer, unless a stop string did."""
        ended = completion.finish_reason == "stop" and completion.token_ids[-1] in self._stop_ids
        if self._writer is not None and ended:
            self._writer.end()

    def json(self, text: str, finish: str | None) -> Json:
        """A choice with this text, and the log probabilities that came since the last."""
        logprobs = None if self._writer is None else self._writer.take()
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, piece: StreamPiece) -> Json | None:
        """What a piece of a stream adds; None if it shows nothing."""
        text = "" if self._begun else self.begin(piece.prompt_logprobs)
        text += self.add(piece.text, piece.logprobs)
        if piece.completion is not None:
            self.end(piece.completion)
            return self.json(text, finish_reason(piece.completion)) | {"qvl": qvl_json(piece.completion)}
        if not text and not piece.boxes:
            return None
        delta = self.json(text, None)
        if piece.boxes:
            images = tuple(span.image for span in self._encoded.spans)
            delta["qvl"] = {"boxes": [box_json(box, images) for box in piece.boxes]}
        return delta
