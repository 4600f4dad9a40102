"""Compute a step: encode its images, run the model once, and sample a token for each branch at the end of its tokens.

A step has two halves: `launch` and `sample` queue it on the device, and `read` waits for its tokens. In between, the
core may launch the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from qvl_runtime.errors import QVLError
from qvl_runtime.schedule.answers import Answers
from qvl_runtime.schedule.numerics import numerics_error
from qvl_runtime.schedule.penalties import PenaltyStack
from qvl_runtime.schedule.runner import Chunk, Computed, Runner
from qvl_runtime.schedule.sampler import Sample, Sampled
from qvl_runtime.schedule.sampling_state import SamplingRow
from qvl_runtime.schedule.scheduler import ScheduledBranch, Scheduler

_UNREAD = (0,)  # stands for a token that is on the device alone


class Outcome(NamedTuple):
    """The tokens that a step sampled for a branch, one and one more for each draft, or why there are none."""

    planned: ScheduledBranch
    samples: list[Sample]
    error: QVLError | None = None


class Before(NamedTuple):
    """What a step finds, and changes before its tokens are read."""

    length: int  # of the branch's sequence
    branches: int  # of its request


class Launched(NamedTuple):
    """A step whose model call is queued on the device."""

    plan: list[ScheduledBranch]
    before: list[Before]  # for each branch
    computed: Computed

    def of(self, kept: Items[int]) -> Launched:
        """Return the step with some of its branches alone, given by index. Each must have a single token."""
        return Launched([self.plan[i] for i in kept], [self.before[i] for i in kept], self.computed.of(kept))


class Unread(NamedTuple):
    """A step whose tokens are sampled on the device and not read."""

    launched: Launched
    outcomes: list[Outcome]  # those without an error are in the order of the sampled rows
    sampled: Sampled | None  # None: no branch is at the end of its tokens


class Computing:
    """Computes what the scheduler has planned. If a method raises, Ctrl-C included, all branches are as before."""

    def __init__(self, runner: Runner, answers: Answers, scheduler: Scheduler, final: bool) -> None:
        """final: the tokens on the device are those that will be read, where a mask rules some out, too."""
        self._runner, self._answers, self._scheduler, self._final = runner, answers, scheduler, final
        self._penalties = PenaltyStack()

    def launch(self, plan: Items[ScheduledBranch], tokens: Tensor | None = None) -> Launched:
        """Encode the images of a step and queue its model call.

        tokens int64 [branches], on the device: the one of each branch, if the host does not know them.
        """
        before = [Before(p.branch.sequence.length, len(p.branch.request.branches)) for p in plan]
        with self._undone(plan, before):
            if tokens is not None:
                return Launched(
                    [*plan], before, self._runner.compute([Chunk(p.branch.sequence, _UNREAD) for p in plan], tokens)
                )
            self._encode_images(plan)
            chunks = [Chunk(p.branch.sequence, p.tokens, p.branch.chunk_spans(p.known)) for p in plan]
            computed = self._runner.compute(chunks)
            self._score(plan, computed)
            return Launched([*plan], before, computed)

    def sample(self, launched: Launched) -> Unread:
        """Compute logits for the tokens that need them, and sample a token from each."""
        with self._undone(launched.plan, launched.before):
            indices: list[int] = []
            rows: list[SamplingRow] = []
            outcomes: list[Outcome] = []
            end = 0
            for planned in launched.plan:
                start, end = end + planned.known - 1, end + planned.size
                if not planned.samples:
                    continue
                for branch in [planned.branch, *self._answers.fork(planned.branch)]:
                    scheduled = planned if branch is planned.branch else ScheduledBranch(branch, 0)
                    try:
                        rows += branch.sampling_state.rows(len(branch.output.token_ids), planned.drafts)
                    except QVLError as error:
                        outcomes.append(Outcome(scheduled, [], error.with_traceback(None)))
                        continue
                    indices += range(start, end)
                    outcomes.append(Outcome(scheduled, []))
            if not indices:
                return Unread(launched, outcomes, None)
            logits = launched.computed(indices)
            return Unread(
                launched, outcomes, Sampled(logits, rows, self._runner.model.ops, self._penalties, self._final)
            )

    def read(self, unread: Unread, before: Callable[[Unread], None] | None = None) -> list[Outcome]:
        """Wait for the tokens of a step. Parts of prompts are among the outcomes if they are damaged.

        before: called before it waits; may launch the next step.
        """
        with self._undone(unread.launched.plan, unread.launched.before):
            if before is not None:
                before(unread)
            samples = iter(() if unread.sampled is None else unread.sampled.read())
            for planned, branch_samples, fault in unread.outcomes:
                if fault is None:
                    branch_samples += [next(samples) for _ in range(len(planned.drafts) + 1)]
            return unread.outcomes + _damaged_parts(unread.launched)

    @contextmanager
    def _undone(self, plan: Items[ScheduledBranch], before: Items[Before]) -> Iterator[None]:
        """Restore the branches if the block raises: a later step ahead of this one is undone with it."""
        try:
            yield
        except BaseException:
            for planned, (length, branches) in zip(plan, before, strict=True):
                branch = planned.branch
                branch.sequence.truncate(length)
                branch.recount()
                for fork in branch.request.branches[branches:]:
                    self._scheduler.remove(fork)
                del branch.request.branches[branches:]
            raise

    def _encode_images(self, plan: Items[ScheduledBranch]) -> None:
        """Get the features of all images with tokens in this step; new ones share a pass of the vision encoder."""
        missing = [
            (p.branch, i, span.image)
            for p in plan
            for i, span in p.branch.spans_in_next(p.known)
            if i not in p.branch.features
        ]
        if not missing:
            return
        began = time.perf_counter()
        for (branch, i, _), rows in zip(missing, self._runner.features([w[2] for w in missing]), strict=True):
            branch.features[i] = rows
        elapsed = time.perf_counter() - began
        for request in {branch.request for branch, _, _ in missing}:
            request.clock.vision_s += elapsed

    def _score(self, plan: Items[ScheduledBranch], computed: Computed) -> None:
        """Score the parts of prompts in this step whose log probabilities were requested."""
        for planned, end in zip(plan, accumulate(p.size for p in plan), strict=True):
            scores = planned.branch.request.scores
            if scores is not None and planned.branch.index == 0 and scores.next_index is not None:
                position = planned.branch.sequence.length - planned.size
                scores.take(position, planned.size, partial(_rows, computed, end - planned.size))


def _rows(computed: Computed, first: int, indices: Items[int]) -> Tensor:
    """The logits of tokens that are counted from `first`."""
    return computed([first + index for index in indices])


def _damaged_parts(launched: Launched) -> list[Outcome]:
    """Find the parts of prompts that are not finite, so that the prefix cache does not get their blocks."""
    ends = accumulate(planned.size for planned in launched.plan)
    parts = [(planned, end - 1) for planned, end in zip(launched.plan, ends, strict=True) if not planned.samples]
    if not parts:
        return []
    finite = launched.computed.are_finite([last for _, last in parts])
    damaged = [part for part, is_finite in zip(parts, finite, strict=True) if not is_finite]
    return [Outcome(planned, [], numerics_error(launched.computed([last])[0])) for planned, last in damaged]
