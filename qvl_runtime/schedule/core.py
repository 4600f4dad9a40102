"""The engine core: schedule a step, encode its images, run the model once, sample and append the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from qvl_runtime.errors import CapacityError, QVLError
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.box_calibration import BoxCalibration
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.answers import Answers
from qvl_runtime.schedule.api import SamplingParams, StreamPiece
from qvl_runtime.schedule.computing import Computing, Launched, Outcome
from qvl_runtime.schedule.constraint import Constrain
from qvl_runtime.schedule.overlap import Overlap
from qvl_runtime.schedule.request import Branch, Clock, Request
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.schedule.sampler import Sample
from qvl_runtime.schedule.scheduler import ScheduledBranch, Scheduler, StepLimits
from qvl_runtime.schedule.scoring import PromptScores
from qvl_runtime.schedule.speculative import Drafter
from qvl_runtime.schedule.step_faults import compute_contained, error_of


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
        overlap: bool = False,
    ) -> None:
        """overlap: launch decode steps before the tokens of the last are read, where embeddings are on the device."""
        self.runner, self.drafter, self.max_model_len = runner, drafter, max_model_len
        self.step_tokens = limits.tokens
        self.scheduler = Scheduler(runner.cache, limits, drafter)
        self.scheduler.least_forced = runner.least_forced
        self.answers = Answers(runner, self.scheduler, tokenizer, max_model_len, calibration)
        overlap = overlap and not runner.model.embedding_on_host
        self.computing = Computing(runner, self.answers, self.scheduler, final=overlap)
        self.overlap = Overlap(self.scheduler, self.answers, self.computing) if overlap else None
        self._landed: Launched | None = None  # the step to compute now, if it was launched ahead
        self.steps = 0
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
        self._let_go()

    def step(self) -> bool:
        """Run one step. Returns False if nothing could be computed and no request ended.

        An error that one request causes ends that request, and is in its `error`.
        """
        ended = self._expire()
        self._landed = None if self.overlap is None else self.overlap.land()
        plan = self._plan() if self._landed is None else self._landed.plan
        if not plan:
            return ended or plan is None
        now = time.perf_counter()
        for planned in plan:
            clock = planned.branch.request.clock
            clock.scheduled = now if clock.scheduled is None else clock.scheduled
        try:
            for outcome in compute_contained(plan, self._compute, self._fail):
                self._contained(outcome.planned.branch, partial(self._take, outcome))
            for planned in plan:
                if not planned.samples and planned.branch.request.error is None:
                    self._contained(planned.branch, planned.branch.finish_step)
        except BaseException:
            self._rewind(plan)
            raise
        self.steps += 1
        self._let_go()
        return True

    def _let_go(self) -> None:
        if self.overlap is not None:
            self.overlap.drop()

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
        """Compute a step, or what is left to do of one that was launched ahead; launch the next before it is read."""
        landed, self._landed = self._landed, None
        unread = self.computing.sample(self.computing.launch(plan) if landed is None else landed)
        return self.computing.read(unread, None if self.overlap is None else self.overlap.launch_next)

    def _rewind(self, plan: Items[ScheduledBranch]) -> None:
        """Return the branches of a step that was interrupted to the tokens that they have."""
        for branch in (planned.branch for planned in plan):
            branch.sequence.truncate(len(branch.token_ids) - 1)
            branch.recount()

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
        branch.sequence.truncate(len(branch.token_ids) - 1 + branch.sequence.ahead)
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
