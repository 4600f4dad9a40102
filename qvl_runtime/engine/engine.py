"""The engine: one model that answers prompts, alone or in batches, whole or streamed."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.engine.arguments import checked_list, checked_params, prompt_list
from qvl_runtime.engine.constraints import Constraints
from qvl_runtime.engine.judging import Judging
from qvl_runtime.engine.loading import load_runner
from qvl_runtime.engine.report import describe, note_of_defaults
from qvl_runtime.engine.score import continued
from qvl_runtime.engine.turns import Turns, check_fork
from qvl_runtime.errors import PromptError, QVLError
from qvl_runtime.formats.adapter import Adapter
from qvl_runtime.prompt.box_calibration import BoxCalibration
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.chatml import Draft, EncodedPrompt, Prompt, PromptEncoder
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, TokenLogprob
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.request import Request
from qvl_runtime.schedule.scheduler import StepLimits
from qvl_runtime.schedule.speculative import Drafter
from qvl_runtime.weights.hub import Source, resolve_model
from qvl_runtime.weights.loader import Weights, model_config
from qvl_runtime.weights.synthetic import synthetic_config

_log = logging.getLogger("qvl_runtime")

NANO = Path(__file__).parents[1] / "nano"


class Encoded(NamedTuple):
    """A prompt ready to be submitted, and the seconds that encoding it took."""

    prompt: EncodedPrompt
    image_s: float


class Engine(Judging):
    """A checkpoint on a device, for any number of threads: their requests run together, and each gets its own answer.

    A forked child cannot use its parent's engine: every method raises `ForkError` there.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        download: bool = False,
        source: Source = "huggingface",
        revision: str | None = None,
        progress: bool = True,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        weights: Weights | None = None,
        **options: Any,
    ) -> None:
        """Load `model`: a folder, a hub id, or None for the small checkpoint that ships with the package.

        A hub id is looked up among earlier downloads, and downloaded only with `download=True`. `adapters` are LoRA
        adapters by the name that `SamplingParams.adapter` gives, each in a folder as peft writes it. `weights` are run
        instead of the folder's, such as those of a network in training. `options` are the other fields of
        `EngineConfig`. Raises `ConfigError`, `CheckpointError` or `DownloadError`, and `ForkError` in a
        child forked from a process that has made an engine.
        """
        check_fork()
        began = time.perf_counter()
        self.engine_config = engine_config = EngineConfig(device=device, dtype=dtype, **options)
        step_limits = StepLimits(engine_config.max_step_tokens, engine_config.max_running)
        self.folder = resolve_model(
            NANO if model is None else model, download=download, source=source, revision=revision, progress=progress
        )
        self.config = config = model_config(self.folder)
        if engine_config.synthetic is not None:
            self.config = config = synthetic_config(engine_config.synthetic, config)
        self.defaults = defaults = GenerationDefaults.from_folder(self.folder)
        self.tokenizer = Tokenizer.from_folder(self.folder, config.visual.n_queries, config.visual.image_start_id)
        if engine_config.synthetic is not None:
            self.folder = Path(f"synthetic {engine_config.synthetic}")  # the name in reports
        defaults.check_ids(config.vocab_size)
        self.max_model_len = engine_config.max_model_len or config.context_limit
        self._prompts = PromptEncoder(
            self.tokenizer,
            config.visual.image_size,
            defaults.chat_format,
            defaults.max_window_size,
            limits=engine_config.image_limits,
            end_ids=defaults.end_ids,
            end_sequences=defaults.end_sequences,
        )
        calibration = BoxCalibration.from_folder(self.folder)
        runner = load_runner(engine_config, config, self.folder, self.max_model_len, weights, adapters)
        drafter = Drafter(engine_config.speculative_tokens) if engine_config.speculative_tokens else None
        overlap = runner.model.device.type == "cuda" if engine_config.overlap is None else engine_config.overlap
        self.core = EngineCore(runner, self.tokenizer, self.max_model_len, step_limits, drafter, calibration, overlap)
        self.constraints = Constraints(self.core.answers.judge.spelling, config.vocab_size)
        self._turns = Turns(self.core)
        self._load_s = time.perf_counter() - began
        _log.info("%s", self.summary())
        kernels = self.report()["kernels"]
        if "reference" in kernels["ops"] and not os.environ.get("QVL_KERNELS"):
            _log.warning("no fast kernels: %s", kernels["why"])

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer a list of prompts together, and return the completions in order; `params` is for all, or one for each.

        A prompt is a string with Qwen's tags, a list of parts, messages, or token ids with images. With n > 1 a
        completion has the other answers in `alternatives`. A prompt that cannot be computed does not stop the others:
        its error is raised once all are done, and what became of each is in the error's `completions`.
        """
        batch = prompt_list(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(batch)
        if len(each) != len(batch):
            raise PromptError(f"there are {len(batch)} prompts and {len(each)} sampling parameters; expected one each")
        encoded = [self.encode(prompt) for prompt in batch]  # before any is submitted: an error costs no answer
        requests = self._run(zip(encoded, each, strict=True))
        errors = [request.error for request in requests if request.error is not None]
        if errors:
            errors[0].completions = tuple(request.error or request.completion() for request in requests)
            raise errors[0]
        return [request.completion() for request in requests]

    def as_completed(
        self, requests: Iterable[tuple[Any, Prompt | Encoded, SamplingParams | None] | None], window: int | None = None
    ) -> Iterator[tuple[Any, Completion | QVLError]]:
        """Answer (tag, prompt, params) together, and yield (tag, completion or error) in the order of completion.

        Requests are read lazily, up to `window` ahead (by default twice as many as run together), so there may be any
        number of them. One that is invalid or fails yields its error and does not stop the others. While some are open,
        None instead of a request means that there is none yet: the open ones are computed, and then it is asked again.
        """
        waiting, open_requests = iter(requests), deque[Request]()
        max_open = window or 2 * self.engine_config.max_running
        try:
            while True:
                while len(open_requests) < max_open and (upcoming := next(waiting, None)) is not None:
                    tag, prompt, params = upcoming
                    try:
                        encoded = prompt if isinstance(prompt, Encoded) else self.encode(prompt)
                        open_requests.append(self.submit(encoded, params, tag=tag))
                    except QVLError as error:
                        yield tag, error
                if not open_requests:
                    return
                self._turns.step_once(lambda: any(request.done for request in open_requests))
                for request in [r for r in open_requests if r.done]:
                    open_requests.remove(request)
                    yield request.tag, request.error or request.completion()
        finally:
            for request in open_requests:
                self.cancel(request)

    def submit(
        self, encoded: Encoded, params: SamplingParams | None = None, streamed: bool = False, tag: Any = None
    ) -> Request:
        """Queue a request in `core`, for callers that take its steps or wait for them with `exclusive`."""
        resolved = checked_params(params).resolve(self.defaults)
        constrain = self.constraints.of(resolved, encoded.prompt.token_ids)
        with self.exclusive():
            return self.core.submit(encoded.prompt, resolved, encoded.image_s, streamed, tag, constrain)

    def cancel(self, request: Request) -> None:
        """Remove a submitted request and free its memory, now or when the running step ends. Safe in any thread."""
        self._turns.cancel(request)

    def check_process(self) -> None:
        """Raise `ForkError` in a forked child of the process that made the engine."""
        self._turns.check_process()

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other threads from the core, between two steps, for callers of `core`."""
        return self._turns.exclusive()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamPiece]:
        """Answer one prompt piece by piece, whole characters only; the last piece carries the completion.

        With n > 1, the pieces of the answers alternate: `answer` tells them apart, and each has its own completion.
        Closing the iterator cancels the request and frees its memory. Raises the request's error after the pieces that
        preceded it, such as `NumericsError` for logits that are not finite.
        """
        return self._stream(self._prompts.draft, prompt, params)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        stream: Literal[False] = False,
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, *, stream: Literal[True]
    ) -> Iterator[StreamPiece]: ...
    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, stream: bool = False
    ) -> Completion | Iterator[StreamPiece]:
        """Answer a conversation of OpenAI-style messages. Their text is never searched for tags."""
        if stream:
            return self._stream(self._prompts.draft_chat, messages, params)
        return self.generate([messages], params)[0]

    def score_continuations(
        self, prefix: Prompt, continuations: Sequence[str | Sequence[int]], top: int = 0
    ) -> list[tuple[TokenLogprob, ...]]:
        """Return the log probabilities of the tokens of each continuation of one prompt, which is computed once.

        A continuation is token ids, or text in which only grounding tags are special. `top`: the alternatives for each
        token, of which the first is the greedy one. Raises `PromptError` for an empty one, and `CapacityError`.
        """
        listed = checked_list("continuations", continuations, "texts or lists of token ids")
        encoded = self.encode(prefix)
        params = SamplingParams(max_tokens=1, prompt_logprobs=top, logprob_start=len(encoded.prompt.token_ids))
        whole = [Encoded(continued(encoded.prompt, self.tokenizer, each), 0.0) for each in listed]
        requests = self._run((prompt, params) for prompt in whole[:1])  # leaves the prefix in the cache
        requests += self._run((prompt, params) for prompt in whole[1:])
        return [request.completion().prompt_logprobs or () for request in requests]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the LoRA adapters, in the order that they were given."""
        adapters = self.core.runner.model.adapters
        return () if adapters is None else adapters.names

    def report(self) -> dict[str, Any]:
        """Report model, device, dtype, kernels and why they were chosen, memory in bytes, caches and hit rates."""
        with self.exclusive():
            return describe(self.folder, self.core, self._load_s)

    def summary(self) -> str:
        """Summarize the report in one line."""
        report = self.report()
        size = report["memory"]["weights"] / 2**20
        dtype, device, ops = report["dtype"], report["device"], report["kernels"]["ops"]
        return f"{self.folder.name}: {size:,.1f} MiB in {dtype} on {device}; ops: {ops}"

    def defaults_note(self, params: SamplingParams | None = None) -> str | None:
        """Describe the parameters that generation_config.json sets for a request; None if it is plain greedy."""
        return note_of_defaults(params or SamplingParams(), self.defaults, self._prompts.usual_stop_ids)

    def encode(self, prompt: Prompt) -> Encoded:
        """Encode a prompt of any form to tokens and images. Safe in any thread, as it does not use the model."""
        return self._encoded(self._prompts.draft, prompt)

    def draft(self, prompt: Prompt) -> Draft:
        """Encode the text of a prompt, the first half of `encode`. Safe in any thread."""
        return self._prompts.draft(prompt)

    def read_images(self, draft: Draft, cancellation: Cancellation = NEVER) -> EncodedPrompt:
        """Read the images of a draft, the second half of `encode`, unless they are canceled. Safe in any thread."""
        if draft.dropped_turns:
            _log.warning("the %d oldest turns of the conversation do not fit and are left out", draft.dropped_turns)
        return self._prompts.read_images(draft, cancellation)

    def _run(self, prompts: Iterable[tuple[Encoded, SamplingParams | None]]) -> list[Request]:
        """Answer prompts together, and return their requests, which are done."""
        requests: list[Request] = []
        try:
            for prompt, params in prompts:
                requests.append(self.submit(prompt, params))
            self._turns.step_until(lambda: all(request.done for request in requests))
        finally:
            for request in requests:
                self.cancel(request)
        return requests

    def _stream(self, draft: Any, prompt: Any, params: SamplingParams | None) -> Iterator[StreamPiece]:
        return self._stream_pieces(draft, prompt, checked_params(params))

    def _stream_pieces(self, draft: Any, prompt: Any, params: SamplingParams) -> Iterator[StreamPiece]:
        request = self.submit(self._encoded(draft, prompt), params, streamed=True)
        try:
            while request.pieces or not request.done:
                while request.pieces:
                    yield request.pieces.popleft()
                if not request.done:
                    self._turns.step_until(lambda: request.pieces or request.done)
            if request.error is not None:
                raise request.error
        finally:
            self.cancel(request)

    def _encoded(self, draft: Any, prompt: Any) -> Encoded:
        self.check_process()
        began = time.perf_counter()
        encoded = self.read_images(draft(prompt))
        return Encoded(encoded, time.perf_counter() - began)
