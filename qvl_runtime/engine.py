"""The engine: one model, ready to answer. `generate` is `stream`, collected; a batch of one is a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from qvl_runtime.config import EngineConfig, GenerationDefaults, ModelConfig
from qvl_runtime.device import choose_device, choose_dtype, describe
from qvl_runtime.errors import CapacityError, PromptError
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import EncodedPrompt, Prompt, PromptEncoder
from qvl_runtime.prompt.images import ImageLimits
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.generation import Generation, picture_spans
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.kv_cache import Sequence as CachedSequence
from qvl_runtime.schedule.request import Completion, SamplingParams, StreamPiece
from qvl_runtime.schedule.runner import Chunk, Runner
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.hub import Source, resolve_model
from qvl_runtime.weights.synthetic import SyntheticState, synthetic_config

_log = logging.getLogger("qvl_runtime")

NANO = Path(__file__).parent / "nano"
SCORED_AT_ONCE = 256 * 2**20  # bytes of logits that `score` holds where they are not asked for


class Score(NamedTuple):
    """A prompt's own probability: what the model gives each token after those before it."""

    token_ids: tuple[int, ...]  # n
    logprobs: Tensor  # float32 [n - 1], natural logarithms; entry i is that of token i + 1
    logits: Tensor | None  # float32 [n, vocab], where asked for


class Engine:
    """A checkpoint on a device. Not for use from several threads at once."""

    def __init__(
        self, model: str | Path | None = None, *, device: str = "auto", dtype: str = "auto", download: bool = False,
        source: Source = "huggingface", revision: str | None = None, progress: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """Load `model`: a folder, a hub id, or None for the small checkpoint that ships with the package.

        A hub id is looked for among what was downloaded before, and fetched with `download=True` only. `options` are
        the further fields of `EngineConfig`. Raises `ConfigError`, `CheckpointError` or `DownloadError`.
        """
        began = time.perf_counter()
        self.engine_config = asked = EngineConfig(device=device, dtype=dtype, **options)
        self.folder = resolve_model(
            NANO if model is None else model, download=download, source=source, revision=revision, progress=progress
        )
        self.config = config = ModelConfig.from_folder(self.folder)
        if asked.synthetic is not None:
            self.config = config = synthetic_config(asked.synthetic, config)
        self.defaults = defaults = GenerationDefaults.from_folder(self.folder)
        self.tokenizer = Tokenizer.from_folder(self.folder, config.visual.n_queries, config.visual.image_start_id)
        if asked.synthetic is not None:
            self.folder = Path(f"synthetic {asked.synthetic}")  # what is said to run
        self.max_model_len = asked.max_model_len or config.context_limit
        limits = ImageLimits(
            max_bytes=asked.max_image_bytes, max_pixels=asked.max_image_pixels, timeout_s=asked.image_timeout_s,
            max_images=asked.max_images, allow_urls=asked.allow_urls,
        )  # fmt: skip
        self._prompts = PromptEncoder(
            self.tokenizer, config.visual.image_size, defaults.chat_format, defaults.max_window_size, limits=limits
        )
        place, kind = choose_device(asked.device), choose_dtype(asked.dtype, config)
        state: MutableMapping[str, Tensor]
        if asked.synthetic is None:
            state = load_state(self.folder, config, kind, place)
        else:
            state = SyntheticState(config, kind, asked.repeat_blocks)
        network = QwenVL(config, state, asked.precision)
        cached_as = torch.int8 if asked.kv_cache == "int8" else kind
        cache = KVCache(config, self.max_model_len, cached_as, place)
        self._runner = Runner(network, cache, ImageCache(asked.image_cache_bytes))
        self._load_s = time.perf_counter() - began
        _log.info("%s", self.summary())

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer each of a list of prompts, in order; `params` is for all, or a list with one for each.

        A prompt is a string with Qwen's tags, a list of parts, messages, or token ids with pictures. With n > 1 a
        completion holds its further answers in `alternatives`.
        """
        asked = _as_list(prompts)
        shared = params is None or isinstance(params, SamplingParams)
        each = [params] * len(asked) if shared else list(params)  # type: ignore[arg-type]
        if len(each) != len(asked):
            raise PromptError(f"there are {len(asked)} prompts and {len(each)} sampling parameters; expected as many")
        return [self._collect(prompt, own) for prompt, own in zip(asked, each, strict=True)]  # type: ignore[arg-type]

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
        return self._collect(messages, params)

    def score(self, prompt: Prompt, return_logits: bool = False) -> Score:
        """The log probability of each token of a prompt after the first, pad ids of pictures included."""
        encoded = self._prompts.encode(prompt)
        ids = encoded.token_ids
        with self._admit(encoded) as sequence:
            x = self._runner.run([Chunk(sequence, ids, picture_spans(self._runner, encoded))])
        rows = len(ids) if return_logits else max(1, SCORED_AT_ONCE // (4 * self.config.vocab_size))
        following = torch.tensor(ids[1:], device=x.device)
        logprobs, logits = [], torch.empty(0)
        for start in range(0, len(ids), rows):
            logits = self._runner.model.logits(x[start : start + rows]).float()
            wanted = following[start : start + rows, None]
            logprobs.append((logits[: len(wanted)].log_softmax(-1)).gather(1, wanted)[:, 0])
        return Score(tuple(ids), torch.cat(logprobs), logits if return_logits else None)

    def report(self) -> dict[str, Any]:
        """What runs: model, device, dtype, kernels and why those, memory in bytes, caches and their hit rates."""
        return describe(self.folder, self._runner, self._load_s)

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

    def _collect(self, prompt: Prompt, params: SamplingParams | None) -> Completion:
        pieces = self._pieces(self._prompts.encode, prompt, params or SamplingParams())
        first, *others = [piece.completion for piece in pieces if piece.completion is not None]
        return replace(first, alternatives=tuple(others))

    def _stream(self, encode: Any, prompt: Any, params: SamplingParams | None) -> Iterator[StreamPiece]:
        params = params or SamplingParams()
        if params.n != 1:
            raise PromptError(f"n is {params.n}, but a stream is one answer: use generate for several")
        return self._pieces(encode, prompt, params)

    def _pieces(self, encode: Any, prompt: Any, params: SamplingParams) -> Iterator[StreamPiece]:
        began = time.perf_counter()
        encoded: EncodedPrompt = encode(prompt)
        if encoded.dropped_turns:
            _log.warning("the %d oldest turns of the conversation do not fit and are left out", encoded.dropped_turns)
        read = time.perf_counter() - began
        request = Generation(self._runner, self.tokenizer, encoded, params.resolve(self.defaults), read)
        with self._admit(encoded, answer=1) as sequence:
            yield from request.pieces(sequence, self.max_model_len)

    def _admit(self, encoded: EncodedPrompt, answer: int = 0) -> CachedSequence:
        """A sequence for a prompt that fits; its NTK factor is fixed here, from the whole prompt."""
        length, limit = len(encoded.token_ids), self.max_model_len
        if length + answer > limit:
            way_out = "shorten it" if limit >= self.config.context_limit else "shorten it or raise max_model_len"
            raise CapacityError(f"the prompt has {length} tokens; the context holds {limit} with the answer: {way_out}")
        return self._runner.cache.sequence(ntk_alpha(self.config, length))


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
