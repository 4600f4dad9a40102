"""Places in a step where the fault of one request is put, told by its `cache_salt`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qvl_runtime.schedule.prefix_cache import PrefixCache, Root
from qvl_runtime.schedule.request import Branch
from qvl_runtime.schedule.runner import Chunk, Runner
from qvl_runtime.schedule.sampler import Sampled

BAD = "bad"  # the cache_salt of a request that is to fail


def in_the_model(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    compute = Runner.compute

    def raising(self: Runner, chunks: Sequence[Chunk], *tokens: Any) -> Any:
        computed = compute(self, chunks, *tokens)
        if any(chunk.sequence.root.salt == BAD for chunk in chunks):
            raise fault()
        return computed

    patch.setattr(Runner, "compute", raising)


def in_the_images(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    features = Runner.features

    def raising(self: Runner, images: Sequence[Any]) -> Any:
        if any(one.digest in HOSTILE for one in images):
            raise fault()
        return features(self, images)

    patch.setattr(Runner, "features", raising)


def in_the_sampler(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    read = Sampled.read

    def raising(self: Sampled) -> Any:
        found = read(self)  # tokens are marked as seen before it raises
        if any(row.state.params.cache_salt == BAD for row in self.rows):
            raise fault()
        return found

    patch.setattr(Sampled, "read", raising)


def in_the_scheduler(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    match = PrefixCache.match

    def raising(self: PrefixCache, tokens: Any, spans: Any, root: Root) -> Any:
        if root.salt == BAD:
            raise fault()
        return match(self, tokens, spans, root)

    patch.setattr(PrefixCache, "match", raising)


def in_the_output(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    add = Branch.add

    def raising(self: Branch, sampled: Any) -> None:
        if self.sequence.root.salt == BAD and len(self.output.token_ids) == 2:
            raise fault()
        add(self, sampled)

    patch.setattr(Branch, "add", raising)


def at_the_end_of_the_step(patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    finish = Branch.finish_step

    def raising(self: Branch) -> None:
        finish(self)
        if self.sequence.root.salt == BAD:
            raise fault()

    patch.setattr(Branch, "finish_step", raising)


HOSTILE: set[bytes] = set()
PLACES = [
    in_the_model, in_the_images, in_the_sampler, in_the_scheduler, in_the_output, at_the_end_of_the_step,
]  # fmt: skip
