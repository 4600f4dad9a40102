"""Single model calls at any context: decode and prefill steps without the hours that it takes to get there.

The tokens before a step are written into the KV cache as zeros instead of being computed. What is read and what is
calculated is the same, so is the time; what such a step says is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager

import torch

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import CapacityError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.profile.run_info import finish
from qvl_runtime.profile.spread import Spread
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.device_sampler import sampler_for
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.schedule.sampler import Draws, Row
from qvl_runtime.schedule.sequence import Sequence


def decode(engine: Engine, contexts: Items[int], batch: int = 1, rounds: int = 5) -> dict[int, Spread]:
    """Seconds a step in which `batch` sequences of each context get a token: model, logits and choice.

    The contexts take turns, so that a slow minute of the machine slows them all.
    """
    samples: dict[int, list[float]] = {context: [] for context in contexts}
    with decoding(engine, max(contexts), batch) as step:
        for round_ in range(rounds + 1):  # the first is not counted
            for context in contexts:
                began = time.perf_counter()
                step(context)
                if round_:
                    samples[context].append(time.perf_counter() - began)
    return {context: Spread.of(taken) for context, taken in samples.items()}


@contextmanager
def decoding(engine: Engine, longest: int, batch: int = 1) -> Iterator[Callable[[int], None]]:
    """A call that decodes a token of `batch` sequences at a context of up to `longest`, as often as it is called.

    Raises `CapacityError` where the KV cache does not hold so much.
    """
    runner = engine.loop.runner
    blocks = batch * -(-(longest + 1) // BLOCK_SIZE)
    if blocks * BLOCK_SIZE > runner.cache.num_slots:
        raise CapacityError(
            f"{batch} sequences of {longest} tokens need {blocks * BLOCK_SIZE} slots of KV cache, and there are "
            f"{runner.cache.num_slots}: ask for shorter ones, or raise kv_cache_bytes"
        )
    engine.loop.scheduler.make_room(blocks)
    with ExitStack() as stack:
        sequences = [stack.enter_context(runner.cache.sequence(1.0)) for _ in range(batch)]
        for sequence in sequences:
            _write(engine, sequence, longest)
        params = SamplingParams(temperature=0.0).resolve(engine.defaults)
        device, vocabulary = runner.model.device, engine.config.vocab_size
        choose = sampler_for(runner.model.ops)
        rows = [Row(Draws(params, [1], vocabulary, device, 0), 0) for _ in sequences]

        def step(context: int) -> None:
            for sequence in sequences:
                sequence.length = context
            choose(runner.compute([Chunk(sequence, [1]) for sequence in sequences])([*range(batch)]), rows)
            finish(device)

        yield step


def prefill(engine: Engine, tokens: int, before: int = 0, rounds: int = 3) -> Spread:
    """Seconds until the logits after `tokens` more tokens, with `before` in the cache already, chunk by chunk.

    Of several rounds one more is run first and not counted; a single one is what the first time takes.
    """
    runner, most = engine.loop.runner, engine.engine_config.max_step_tokens
    engine.loop.scheduler.make_room(-(-(before + tokens) // BLOCK_SIZE))
    samples = []
    with runner.cache.sequence(1.0) as sequence:
        _write(engine, sequence, before)
        for round_ in range(rounds + (rounds > 1)):
            sequence.truncate(before)
            began = time.perf_counter()
            for start in range(0, tokens, most):
                hidden = runner.run([Chunk(sequence, [1] * min(most, tokens - start))])
            runner.model.logits(hidden[-1:])
            finish(runner.model.device)
            if round_ or rounds == 1:
                samples.append(time.perf_counter() - began)
    return Spread.of(samples)


def images(engine: Engine, count: int, rounds: int = 3) -> Spread:
    """Seconds that the visual tower takes for so many images given together; `rounds` as in `prefill`."""
    model, size = engine.loop.runner.model, engine.config.visual.image_size
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
    """What a decode step must read at least: the decoder's and the head's weights once, each sequence's KV cache."""
    runner = engine.loop.runner
    weights = sum(runner.model.bytes_by_part[part] for part in ("language", "head"))
    return weights + batch * context * runner.cache.bytes_per_token


def _write(engine: Engine, sequence: Sequence, tokens: int) -> None:
    sequence.append(tokens + 1)
    sequence.length = tokens
    blocks = torch.tensor(sequence.blocks, device=engine.loop.runner.model.device)
    for layer in engine.loop.runner.cache.layers:
        for tensor in layer:
            tensor.index_fill_(0, blocks, 0)
