"""The engine: one model, ready to answer. `generate` is `stream`, collected; a batch of one is a batch."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.engine.capacity import capture_graphs, kv_cache_tokens, room_beside, spare_bytes
from qvl_runtime.engine.report import describe
from qvl_runtime.errors import PromptError, QVLError
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.host import choose_device, choose_dtype, free_memory
from qvl_runtime.model.cache_layout import BLOCK_SIZE, bytes_per_token
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import EncodedPrompt, Prompt, PromptEncoder
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.request import Request
from qvl_runtime.schedule.runner import Chunk, Runner, Span
from qvl_runtime.schedule.scheduler import StepLimits
from qvl_runtime.schedule.speculative import Drafter
from qvl_runtime.weights.hub import Source, resolve_model
from qvl_runtime.weights.loader import load_weights, model_config
from qvl_runtime.weights.synthetic import synthetic_config, synthetic_weights

_log = logging.getLogger("qvl_runtime")

NANO = Path(__file__).parents[1] / "nano"
SCORED_AT_ONCE = 256 * 2**20  # bytes of logits that `score` holds where they are not asked for


class Score(NamedTuple):
    """A prompt's own probability: what the model gives each token after those before it."""

    token_ids: tuple[int, ...]  # n
    logprobs: Tensor  # float32 [n - 1], natural logarithms; entry i is that of token i + 1
    logits: Tensor | None  # float32 [n, vocab], where asked for


class Encoded(NamedTuple):
    """A prompt ready to be submitted, and what reading it took."""

    prompt: EncodedPrompt
    image_s: float


class Engine:
    """A checkpoint on a device. Not for use from several threads at once: for that there is `AsyncEngine`."""

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
        **options: Any,
    ) -> None:
        """Load `model`: a folder, a hub id, or None for the small checkpoint that ships with the package.

        A hub id is looked for among what was downloaded before, and fetched with `download=True` only. `options` are
        the further fields of `EngineConfig`. Raises `ConfigError`, `CheckpointError` or `DownloadError`.
        """
        began = time.perf_counter()
        self.engine_config = asked = EngineConfig(device=device, dtype=dtype, **options)
        steps = StepLimits(asked.max_step_tokens, asked.max_running)
        self.folder = resolve_model(
            NANO if model is None else model, download=download, source=source, revision=revision, progress=progress
        )
        self.config = config = model_config(self.folder)
        if asked.synthetic is not None:
            self.config = config = synthetic_config(asked.synthetic, config)
        self.defaults = defaults = GenerationDefaults.from_folder(self.folder)
        self.tokenizer = Tokenizer.from_folder(self.folder, config.visual.n_queries, config.visual.image_start_id)
        if asked.synthetic is not None:
            self.folder = Path(f"synthetic {asked.synthetic}")  # what is said to run
        self.max_model_len = asked.max_model_len or config.context_limit
        limits = ImageLimits(
            max_bytes=asked.max_image_bytes,
            max_pixels=asked.max_image_pixels,
            timeout_s=asked.image_timeout_s,
            max_images=asked.max_images,
            allow_urls=asked.allow_urls,
        )
        self._prompts = PromptEncoder(
            self.tokenizer, config.visual.image_size, defaults.chat_format, defaults.max_window_size, limits=limits
        )
        place, kind = choose_device(asked.device), choose_dtype(asked.dtype, config)
        state: MutableMapping[str, Tensor]
        free: int | None = None
        if asked.synthetic is None:  # of one that shares its blocks nobody knows the size before it is there
            free = room_beside(asked, config, kind, self.folder, place)
            state, packed = load_weights(self.folder, config, kind, place, asked.embedding_on_host)
        else:
            state, packed = synthetic_weights(config, kind, place, asked.repeat_blocks)
        network = QwenVL(config, state, asked.precision, packed, embedding_on_host=asked.embedding_on_host)
        del state, packed
        trim_heap()
        kept = torch.int8 if asked.kv_dtype == "int8" else kind
        free, spare = free_memory(place) if free is None else free, spare_bytes(network, asked, kept)
        room = kv_cache_tokens(asked, bytes_per_token(config, kept), self.max_model_len, free, spare)
        cache = KVCache(config, room, kept, place, asked.prefix_caching)
        runner = Runner(network, cache, ImageCache(asked.image_cache_bytes))
        capture_graphs(runner, asked, self.max_model_len)
        drafter = Drafter(asked.speculative_tokens) if asked.speculative_tokens else None
        self.core = EngineCore(runner, self.tokenizer, self.max_model_len, steps, drafter)
        self._load_s = time.perf_counter() - began
        _log.info("%s", self.summary())
        kernels = self.report()["kernels"]
        if "reference" in kernels["ops"] and not os.environ.get("QVL_KERNELS"):
            _log.warning("no fast kernels: %s", kernels["why"])

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer a list of prompts together; `params` is for all, or a list with one for each. The order is kept.

        A prompt is a string with Qwen's tags, a list of parts, messages, or token ids with images. With n > 1 a
        completion holds its further answers in `alternatives`.
        """
        asked = _as_list(prompts)
        each = [params] * len(asked) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise PromptError(f"there are {len(asked)} prompts and {len(each)} sampling parameters; expected as many")
        encoded = [self.encode(prompt) for prompt in asked]  # a prompt that is refused costs no answer to another
        requests: list[Request] = []
        try:
            for prompt, own in zip(encoded, each, strict=True):
                requests.append(self.submit(prompt, own))
            while not all(request.done for request in requests):
                self._advance()
        finally:
            for request in requests:
                self.core.cancel(request)
        return [request.completion() for request in requests]

    def as_completed(
        self, requests: Iterable[tuple[Any, Prompt, SamplingParams | None]], window: int | None = None
    ) -> Iterator[tuple[Any, Completion | QVLError]]:
        """Answer (tag, prompt, params) one after another as they are done: pairs of tag and completion, or error.

        The requests are read as they are needed, `window` at a time (twice as many as run together), so that there may
        be any number of them. One that is refused gives its error and stops nobody else.
        """
        waiting, open_requests = iter(requests), deque[Request]()
        most = window or 2 * self.engine_config.max_running
        try:
            while True:
                while len(open_requests) < most and (following := next(waiting, None)) is not None:
                    tag, prompt, params = following
                    try:
                        open_requests.append(self.submit(self.encode(prompt), params, tag=tag))
                    except QVLError as error:
                        yield tag, error
                if not open_requests:
                    return
                self._advance()
                for request in [r for r in open_requests if r.done]:
                    open_requests.remove(request)
                    yield request.tag, request.completion()
        finally:
            for request in open_requests:
                self.core.cancel(request)

    def submit(
        self, encoded: Encoded, params: SamplingParams | None = None, streamed: bool = False, tag: Any = None
    ) -> Request:
        """Put a request in the queue of `loop`, whose steps answer it. For those who drive the loop themselves."""
        resolved = (params or SamplingParams()).resolve(self.defaults)
        return self.core.submit(encoded.prompt, resolved, encoded.image_s, streamed, tag)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamPiece]:
        """Answer one prompt piece by piece, whole characters only; the last piece carries the completion.

        Closing the iterator ends the request and gives its memory back.
        """
        return self._stream(self._prompts.encode, prompt, params)

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
            return self._stream(self._prompts.encode_chat, messages, params)
        return self.generate([messages], params)[0]

    def score(self, prompt: Prompt, return_logits: bool = False) -> Score:
        """The log probability of each token of a prompt after the first, pad ids of images included."""
        encoded = self._prompts.encode(prompt)
        ids = encoded.token_ids
        self.core.check_length(len(ids))
        runner = self.core.runner
        features = runner.features([span.image for span in encoded.spans])
        spans = [Span(span.start, rows) for span, rows in zip(encoded.spans, features, strict=True)]
        self.core.scheduler.make_room(-(-len(ids) // BLOCK_SIZE))
        with runner.cache.sequence(ntk_alpha(self.config, len(ids))) as sequence:
            x = runner.run([Chunk(sequence, ids, spans)])
        rows = len(ids) if return_logits else max(1, SCORED_AT_ONCE // (4 * self.config.vocab_size))
        following = torch.tensor(ids[1:], device=x.device)
        logprobs, logits = [], torch.empty(0)
        for start in range(0, len(ids), rows):
            logits = runner.model.logits(x[start : start + rows]).float()
            wanted = following[start : start + rows, None]
            logprobs.append((logits[: len(wanted)].log_softmax(-1)).gather(1, wanted)[:, 0])
        return Score(tuple(ids), torch.cat(logprobs), logits if return_logits else None)

    def report(self) -> dict[str, Any]:
        """What runs: model, device, dtype, kernels and why those, memory in bytes, caches and their hit rates."""
        return describe(self.folder, self.core, self._load_s)

    def summary(self) -> str:
        """The report in one line."""
        said = self.report()
        size = said["memory"]["weights"] / 2**20
        return (
            f"{self.folder.name}: {size:,.1f} MiB in {said['dtype']} on {said['device']}; ops: {said['kernels']['ops']}"
        )

    def defaults_note(self, params: SamplingParams | None = None) -> str | None:
        """What generation_config.json decides for such a request, where that is not plain greedy; else None."""
        given = params or SamplingParams()
        used = given.resolve(self.defaults)
        plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": None}
        drawn = () if used.temperature else ("top_p", "top_k")  # greedy: the cuts have no effect
        said = [
            f"{name} {getattr(used, name):g}"
            for name, value in plain.items()
            if name not in drawn and getattr(given, name) is None and getattr(used, name) != value
        ]
        return f"from generation_config.json: {', '.join(said)}" if said else None

    def encode(self, prompt: Prompt) -> Encoded:
        """A prompt of any form to tokens and images: what needs no model of a request, so any thread may."""
        return self._encoded(self._prompts.encode, prompt)

    def _stream(self, encode: Any, prompt: Any, params: SamplingParams | None) -> Iterator[StreamPiece]:
        params = params or SamplingParams()
        if params.n != 1:
            raise PromptError(f"n is {params.n}, but a stream is one answer: use generate for several")
        return self._pieces(encode, prompt, params)

    def _pieces(self, encode: Any, prompt: Any, params: SamplingParams) -> Iterator[StreamPiece]:
        request = self.submit(self._encoded(encode, prompt), params, streamed=True)
        try:
            while request.pieces or not request.done:
                while request.pieces:
                    yield request.pieces.popleft()
                if not request.done:
                    self._advance()
        finally:
            self.core.cancel(request)

    def _encoded(self, encode: Any, prompt: Any) -> Encoded:
        began = time.perf_counter()
        encoded: EncodedPrompt = encode(prompt)
        if encoded.dropped_turns:
            _log.warning("the %d oldest turns of the conversation do not fit and are left out", encoded.dropped_turns)
        return Encoded(encoded, time.perf_counter() - began)

    def _advance(self) -> None:
        if not self.core.step():
            raise RuntimeError("there are unanswered requests, but none of them can go on")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts; a string or a dict alone is one. The parts of one prompt without a list around it are refused."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    bare = [p for p in listed if isinstance(p, Mapping) and "token_ids" not in p]
    if bare:
        raise PromptError(
            f"generate takes a list of prompts, and its first dict has {', '.join(map(repr, bare[0]))}: put the "
            "parts or messages of one prompt into a list of their own, generate([[...]]), or use chat(messages)"
        )
    return listed
