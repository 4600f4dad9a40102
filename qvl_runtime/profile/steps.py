"""Time single decode and prefill steps at any context, without the hours it takes to generate up to it.

The tokens before a step are written to the KV cache as zeros instead of being computed. The step reads and computes as
much as a real one, so its time is the same; its output is meaningless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager

import torch

from qvl_kernels.util import cdiv
from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import CapacityError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.profile.run_info import finish
from qvl_runtime.profile.spread import Spread
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.schedule.sampler import sample
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState
from qvl_runtime.schedule.sequence import Sequence


def decode(engine: Engine, contexts: Items[int], batch: int = 1, rounds: int = 5) -> dict[int, Spread]:
    """Seconds per step in which `batch` sequences at each context get a token: forward pass, logits and sampling.

    The contexts take turns, so that a slow minute of the machine slows all of them.
    """
    samples: dict[int, list[float]] = {context: [] for context in contexts}
    with decoding(engine, max(contexts), batch) as step:
        for round_ in range(rounds + 1):  # the first is a warm-up
            for context in contexts:
                began = time.perf_counter()
                step(context)
                if round_:
                    samples[context].append(time.perf_counter() - began)
    return {context: Spread.of(seconds) for context, seconds in samples.items()}


@contextmanager
def decoding(engine: Engine, max_context: int, batch: int = 1) -> Iterator[Callable[[int], None]]:
    """Yield a function that decodes one token of `batch` sequences at a context of up to `max_context`.

    Raises `CapacityError` if the KV cache is too small.
    """
    runner = engine.core.runner
    blocks = batch * cdiv(max_context + 1, BLOCK_SIZE)
    if blocks * BLOCK_SIZE > runner.cache.num_slots:
        raise CapacityError(
            f"{batch} sequences of {max_context} tokens need {blocks * BLOCK_SIZE} slots of KV cache, which has "
            f"{runner.cache.num_slots}: use shorter ones or raise kv_cache_bytes"
        )
    engine.core.scheduler.make_room(blocks)
    with ExitStack() as stack:
        sequences = [stack.enter_context(runner.cache.sequence(1.0)) for _ in range(batch)]
        for sequence in sequences:
            _write(engine, sequence, max_context)
        params = SamplingParams(temperature=0.0).resolve(engine.defaults)
        device, vocabulary = runner.model.device, engine.config.vocab_size
        rows = [SamplingRow(SamplingState(params, [1], vocabulary, device, 0), 0) for _ in sequences]

        def step(context: int) -> None:
            for sequence in sequences:
                sequence.length = context
            sample(runner.compute([Chunk(sequence, [1]) for sequence in sequences])([*range(batch)]), rows)
            finish(device)

        yield step


def prefill(engine: Engine, tokens: int, before: int = 0, rounds: int = 3) -> Spread:
    """Seconds to the logits after `tokens` more tokens, chunk by chunk, with `before` tokens in the cache already.

    Several rounds are preceded by a warm-up; a single round is cold.
    """
    runner, chunk = engine.core.runner, engine.engine_config.max_step_tokens
    engine.core.scheduler.make_room(cdiv(before + tokens, BLOCK_SIZE))
    samples = []
    with runner.cache.sequence(1.0) as sequence:
        _write(engine, sequence, before)
        for round_ in range(rounds + (rounds > 1)):
            sequence.truncate(before)
            began = time.perf_counter()
            for start in range(0, tokens, chunk):
                hidden = runner.run([Chunk(sequence, [1] * min(chunk, tokens - start))])
            runner.model.logits(hidden[-1:])
            finish(runner.model.device)
            if round_ or rounds == 1:
                samples.append(time.perf_counter() - began)
    return Spread.of(samples)


def images(engine: Engine, count: int, rounds: int = 3) -> Spread:
    """Seconds that the vision encoder takes for `count` images in one pass; `rounds` as in `prefill`."""
    model, size = engine.core.runner.model, engine.config.visual.image_size
    pixels = torch.randn(count, 3, size, size)
    samples = []
    for round_ in range(rounds + (rounds > 1)):
        began = time.perf_counter()
        model.encode_images(pixels)
        finish(model.device)
        if round_ or rounds == 1:
            samples.append(time.perf_counter() - began)
    return Spread.of(samples)


def bytes_read(engine: Engine, context: int, batch: int = 1) -> int:
    """The least a decode step must read: the weights of decoder and head once, and each sequence's KV cache."""
    runner = engine.core.runner
    weights = sum(runner.model.bytes_by_part[part] for part in ("language", "head"))
    return weights + batch * context * runner.cache.bytes_per_token


def _write(engine: Engine, sequence: Sequence, tokens: int) -> None:
    """Extend a sequence to `tokens` tokens whose keys and values are zero."""
    sequence.append(tokens + 1)
    sequence.length = tokens
    blocks = torch.tensor(sequence.blocks, device=engine.core.runner.model.device)
    for layer in engine.core.runner.cache.layers:
        for tensor in layer:
            tensor.index_fill_(0, blocks, 0)
