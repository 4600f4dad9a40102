"""The engine core: schedule a step, encode its images, run the model once, sample and append the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from typing import Any, NamedTuple

from torch import Tensor

from qvl_runtime.errors import CapacityError, QVLError
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.box_calibration import BoxCalibration
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.answers import Answers
from qvl_runtime.schedule.api import SamplingParams, StreamPiece
from qvl_runtime.schedule.constraint import Constrain
from qvl_runtime.schedule.numerics import numerics_error
from qvl_runtime.schedule.request import Branch, Clock, Request
from qvl_runtime.schedule.runner import Chunk, Computed, Runner
from qvl_runtime.schedule.sampler import Sample, SamplingRow, sample
from qvl_runtime.schedule.scheduler import ScheduledBranch, Scheduler, StepLimits
from qvl_runtime.schedule.scoring import PromptScores
from qvl_runtime.schedule.speculative import Drafter
from qvl_runtime.schedule.step_faults import compute_contained, error_of


class Outcome(NamedTuple):
    """The tokens that a step sampled for a branch, one and one more for each draft, or why there are none."""

    planned: ScheduledBranch
    samples: list[Sample]
    error: QVLError | None = None


class EngineCore:
    """Queues requests by `submit` and runs them by `step`. Not thread-safe."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        max_model_len: int,
        limits: StepLimits,
        drafter: Drafter | None = None,
        calibration: BoxCalibration | None = None,
    ) -> None:
        self.runner, self.drafter, self.max_model_len = runner, drafter, max_model_len
        self.step_tokens = limits.tokens
        self.scheduler = Scheduler(runner.cache, limits, drafter)
        self.scheduler.least_forced = runner.least_forced
        self.answers = Answers(runner, self.scheduler, tokenizer, max_model_len, calibration)
        self.steps = 0
        self._ops = runner.model.ops
        self._numbers = count()
        self._timed: set[Request] = set()  # those with a deadline

    def submit(
        self,
        prompt: EncodedPrompt,
        params: SamplingParams,
        image_s: float = 0.0,
        streamed: bool = False,
        tag: Any = None,
        constrain: Constrain | None = None,
    ) -> Request:
        """Put a request in the queue; params: resolved. Its NTK factor is fixed here, from the whole prompt.

        Raises `CapacityError` for a request that could never run, `SamplingError` for invalid token ids, and
        `ConstraintError` if `max_tokens` cannot hold what the constraint demands.
        """
        self.check_length(len(prompt.token_ids), answer=1)
        request = Request(next(self._numbers), prompt, params, Clock(image_s), tag, streamed, constrain)
        if params.prompt_logprobs is not None:
            vocab = self.runner.model.config.vocab_size
            request.scores = PromptScores(prompt.token_ids, params.logprob_start, params.prompt_logprobs, vocab)
        alpha = ntk_alpha(self.runner.model.config, len(prompt.token_ids))
        sequence = self.runner.cache.sequence(alpha, params.cache_salt, self.runner.checked_adapter(params.adapter))
        self.scheduler.add(self.answers.new(request, sequence))
        if request.deadline is not None:
            self._timed.add(request)
        return request

    def check_length(self, length: int, answer: int = 0) -> None:
        """Raise `CapacityError` if a prompt of `length` tokens with `answer` more can never be computed."""
        limit = self.max_model_len
        if length + answer > limit:
            raisable = limit < self.runner.model.config.context_limit
            way_out = "shorten it or raise max_model_len" if raisable else "shorten it"
            raise CapacityError(f"the prompt has {length} tokens; the context holds {limit} with the answer: {way_out}")
        self.runner.cache.check_fits_cache(length + answer)

    def share_steps(self, max_parallel: int | None) -> None:
        """Limit what the n answers to one prompt take from other requests: `max_parallel` at a time; None: no limit.

        With a limit, all but the first answer also sit out every other step while a request waits for its first token.
        """
        self.answers.max_parallel = max_parallel
        self.scheduler.yielding = max_parallel is not None

    def cancel(self, request: Request) -> None:
        """Remove a request and free its blocks; a request that is done is not changed."""
        for branch in request.branches:
            self.scheduler.remove(branch)
        self.answers.forget(request)
        self._timed.discard(request)

    def step(self) -> bool:
        """Run one step. Returns False if nothing could be computed and no request ended.

        An error that one request causes ends that request, and is in its `error`.
        """
        ended = self._expire()
        plan = self._plan()
        if not plan:
            return ended or plan is None
        now = time.perf_counter()
        for planned in plan:
            clock = planned.branch.request.clock
            clock.scheduled = now if clock.scheduled is None else clock.scheduled
        for outcome in compute_contained(plan, self._compute, self._fail):
            self._contained(outcome.planned.branch, partial(self._take, outcome))
        for planned in plan:
            if not planned.samples and planned.branch.request.error is None:
                self._contained(planned.branch, planned.branch.finish_step)
        self.steps += 1
        return True

    def _plan(self) -> list[ScheduledBranch] | None:
        """Plan the next step; None if a request could not be scheduled, and has failed."""
        self.answers.start_more()
        try:
            return self.scheduler.schedule()
        except Exception as fault:
            culprit, self.scheduler.current = self.scheduler.current, None
            if culprit is None:
                raise
            self._fail(culprit.request, error_of(fault))
            return None

    def _contained(self, branch: Branch, function: Callable[[], None]) -> None:
        """Run a part of a step that concerns one branch; if it raises, its request fails."""
        try:
            function()
        except Exception as fault:
            self._fail(branch.request, error_of(fault))

    def _compute(self, plan: Items[ScheduledBranch]) -> list[Outcome]:
        """Run the model and sample. On any exception, Ctrl-C included, restore all branches."""
        lengths = [planned.branch.sequence.length for planned in plan]
        num_branches = [len(planned.branch.request.branches) for planned in plan]
        try:
            self._encode_images(plan)
            chunks = [Chunk(p.branch.sequence, p.tokens, p.branch.chunk_spans(p.known)) for p in plan]
            computed = self.runner.compute(chunks)
            self._score(plan, computed)
            return self._sample(plan, computed) + self._check(plan, computed)
        except BaseException:
            for planned, length, branches in zip(plan, lengths, num_branches, strict=True):
                planned.branch.sequence.truncate(length)
                planned.branch.sampling_state.restore(
                    planned.branch.request.prompt.token_ids, planned.branch.output.token_ids
                )
                for fork in planned.branch.request.branches[branches:]:
                    self.scheduler.remove(fork)
                del planned.branch.request.branches[branches:]
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
        for (branch, i, _), rows in zip(missing, self.runner.features([w[2] for w in missing]), strict=True):
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

    def _check(self, plan: Items[ScheduledBranch], computed: Computed) -> list[Outcome]:
        """Find the parts of prompts that are not finite, so that the prefix cache does not get their blocks."""
        ends = accumulate(planned.size for planned in plan)
        parts = [(planned, end - 1) for planned, end in zip(plan, ends, strict=True) if not planned.samples]
        if not parts:
            return []
        finite = computed.are_finite([last for _, last in parts])
        damaged = [part for part, is_finite in zip(parts, finite, strict=True) if not is_finite]
        return [Outcome(planned, [], numerics_error(computed([last])[0])) for planned, last in damaged]

    def _sample(self, plan: Items[ScheduledBranch], computed: Computed) -> list[Outcome]:
        """Compute logits for the tokens that need them, and sample a token from each."""
        indices: list[int] = []
        rows: list[SamplingRow] = []
        outcomes: list[Outcome] = []
        end = 0
        for planned in plan:
            start, end = end + planned.known - 1, end + planned.known + len(planned.drafts)
            if not planned.samples:
                continue
            for branch in [planned.branch, *self.answers.fork(planned.branch)]:
                scheduled = planned if branch is planned.branch else ScheduledBranch(branch, 0)
                try:
                    rows += branch.sampling_state.rows(len(branch.output.token_ids), planned.drafts)
                except QVLError as error:
                    outcomes.append(Outcome(scheduled, [], error.with_traceback(None)))
                    continue
                indices += range(start, end)
                outcomes.append(Outcome(scheduled, []))
        if not indices:
            return outcomes
        samples = iter(sample(computed(indices), rows, self._ops))
        for planned, branch_samples, fault in outcomes:
            if fault is None:
                branch_samples += [next(samples) for _ in range(len(planned.drafts) + 1)]
        return outcomes

    def _take(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._fail(outcome.planned.branch.request, outcome.error)
            return
        self._append_tokens(outcome.planned, outcome.samples)

    def _append_tokens(self, planned: ScheduledBranch, samples: list[Sample]) -> None:
        """Append the sampled tokens up to the first draft that was rejected, or fail the request at the first error.

        With drafts, an error may be of their making: the request continues without.
        """
        branch, drafts = planned.branch, planned.drafts
        taken = 0
        for sampled in samples:
            if sampled.error is not None and drafts:
                branch.drafting = False
                break
            if sampled.error is not None and branch.request.error is None:
                self._fail(branch.request, sampled.error)
            if branch.request.error is not None:  # this one, or that of another answer to the same prompt
                return
            branch.add(sampled)
            taken += 1
            if branch.output.finish_reason is not None or taken > len(drafts) or sampled.token_id != drafts[taken - 1]:
                break
        if drafts and self.drafter is not None and not planned.forced:
            self.drafter.count(len(drafts), max(0, taken - 1))
        branch.sequence.truncate(len(branch.token_ids) - 1)
        branch.finish_step()
        self.answers.postpone(branch)
        if branch.output.finish_reason is not None:
            self._finish(branch, branch.output.finish_reason)

    def _finish(self, branch: Branch, reason: str) -> None:
        branch.complete(reason)
        self.scheduler.remove(branch)
        if branch.request.done:
            self._timed.discard(branch.request)

    def _fail(self, request: Request, error: QVLError) -> None:
        """End a request with an error; its blocks are free afterwards."""
        request.error = error
        self.cancel(request)

    def _expire(self) -> bool:
        """Finish requests past their deadline with the tokens they have. Returns whether there were any."""
        now = time.perf_counter()
        late = [r for r in self._timed if r.deadline is not None and r.deadline <= now]
        for request in late:
            for branch in request.branches:
                if branch.index not in request.completions:
                    self._contained(branch, partial(self._finish, branch, "deadline"))
            if request.error is not None:
                continue
            self.answers.forget(request)
            for index in range(len(request.branches), request.params.n):  # not started
                request.completions[index] = completion = replace(request.completions[0])
                if request.streamed:
                    request.pieces.append(StreamPiece("", (), completion, index))
            self._timed.discard(request)
        return bool(late)


def _rows(computed: Computed, first: int, indices: Items[int]) -> Tensor:
    """The logits of tokens that are counted from `first`."""
    return computed([first + index for index in indices])
