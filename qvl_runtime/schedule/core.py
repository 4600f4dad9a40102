"""The loop that answers requests: plan a step, see its images, run the model once, take what comes out."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

from qvl_runtime.errors import CapacityError
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.answer import Answer
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.device_sampler import sampler_for
from qvl_runtime.schedule.request import Clock, Request, Task
from qvl_runtime.schedule.runner import Chunk, LogitsOf, Runner
from qvl_runtime.schedule.sampler import Draws, Row, Sample
from qvl_runtime.schedule.scheduler import Planned, Scheduler, StepLimits
from qvl_runtime.schedule.sequence import Sequence
from qvl_runtime.schedule.speculative import Drafter


class Outcome(NamedTuple):
    """What a step sampled for a task: one token, and one more for each draft."""

    planned: Planned
    samples: list[Sample]


class Loop:
    """Requests go in by `submit`; each `step` moves all of them on. Not for several threads at once."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        max_model_len: int,
        limits: StepLimits,
        drafter: Drafter | None = None,
    ) -> None:
        self.runner, self.drafter, self.max_model_len = runner, drafter, max_model_len
        self.scheduler = Scheduler(runner.cache, limits, drafter)
        self.steps = 0
        self._tokenizer = tokenizer
        self._sampler = sampler_for(runner.model.ops)
        self._numbers = count()
        self._timed: set[Request] = set()  # those with a deadline

    def submit(
        self,
        prompt: EncodedPrompt,
        params: SamplingParams,
        image_s: float = 0.0,
        streamed: bool = False,
        tag: Any = None,
    ) -> Request:
        """Put a request in the queue; params: resolved. Its NTK factor is fixed here, from the whole prompt.

        Raises `CapacityError` for one that could never run, and `SamplingError` for token ids that do not exist.
        """
        self.refuse(len(prompt.token_ids), answer=1)
        request = Request(next(self._numbers), prompt, params, Clock(image_s), tag, streamed)
        alpha = ntk_alpha(self.runner.model.config, len(prompt.token_ids))
        self.scheduler.add(self._task(request, self.runner.cache.sequence(alpha, params.cache_salt)))
        if request.deadline is not None:
            self._timed.add(request)
        return request

    def refuse(self, length: int, answer: int = 0) -> None:
        """Raise `CapacityError` where a prompt of `length` tokens and an answer of so many can never be computed."""
        limit = self.max_model_len
        if length + answer > limit:
            raisable = limit < self.runner.model.config.context_limit
            way_out = "shorten it or raise max_model_len" if raisable else "shorten it"
            raise CapacityError(f"the prompt has {length} tokens; the context holds {limit} with the answer: {way_out}")
        self.runner.cache.refuse_beyond(length + answer)

    def cancel(self, request: Request) -> None:
        """Forget a request and free all it holds, now; one that is done is left as it is."""
        for task in request.tasks:
            self.scheduler.remove(task)
        self._timed.discard(request)

    def step(self) -> bool:
        """One model call for everything that can go on; False where nothing can, and no deadline ended anything."""
        expired = self._expire()
        plan = self.scheduler.schedule()
        if not plan:
            return expired
        now = time.perf_counter()
        for planned in plan:
            clock = planned.task.request.clock
            clock.scheduled = now if clock.scheduled is None else clock.scheduled
        for planned, samples in self._compute(plan):
            self._advance(planned, samples)
        for planned in plan:
            if not planned.samples:
                planned.task.computed()
        self.steps += 1
        return True

    def _compute(self, plan: list[Planned]) -> list[Outcome]:
        """The model's part of a step. Where it does not come to an end, Ctrl-C included, nothing has happened."""
        lengths = [planned.task.sequence.length for planned in plan]
        begun = [len(planned.task.request.tasks) for planned in plan]
        try:
            self._see(plan)
            chunks = [Chunk(p.task.sequence, p.tokens, p.task.chunk_spans(p.known)) for p in plan]
            return self._sample(plan, self.runner.compute(chunks))
        except BaseException:
            for planned, length, tasks in zip(plan, lengths, begun, strict=True):
                planned.task.sequence.truncate(length)
                for fork in planned.task.request.tasks[tasks:]:
                    self.scheduler.remove(fork)
                del planned.task.request.tasks[tasks:]
            raise

    def _task(self, request: Request, sequence: Sequence) -> Task:
        index, ids, runner = len(request.tasks), request.prompt.token_ids, self.runner
        room = min(self.max_model_len, runner.cache.num_slots) - len(ids)
        answer = Answer(request.prompt, request.params, self._tokenizer, room)
        draws = Draws(request.params, ids, runner.model.config.vocab_size, runner.model.device, index)
        task = Task(request, index, sequence, answer, draws)
        request.tasks.append(task)
        return task

    def _see(self, plan: list[Planned]) -> None:
        """Have the features of all images with rows in this step: one pass of the tower for those that are new."""
        wanted = [
            (p.task, i, span.image) for p in plan for i, span in p.task.uncovered(p.known) if i not in p.task.features
        ]
        if not wanted:
            return
        began = time.perf_counter()
        for (task, i, _), rows in zip(wanted, self.runner.features([w[2] for w in wanted]), strict=True):
            task.features[i] = rows
        took = time.perf_counter() - began
        for request in {task.request for task, _, _ in wanted}:
            request.clock.vision_s += took

    def _sample(self, plan: list[Planned], logits_of: LogitsOf) -> list[Outcome]:
        """Logits for the rows that need them, and a token for each of those."""
        at: list[int] = []
        rows: list[Row] = []
        outcomes: list[Outcome] = []
        end = 0
        for planned in plan:
            start, end = end + planned.known - 1, end + planned.known + len(planned.drafts)
            if not planned.samples:
                continue
            for task in [planned.task, *self._forks(planned.task)]:
                own = planned if task is planned.task else Planned(task, 0)
                at += range(start, end)
                rows += [Row(task.draws, len(task.answer.token_ids) + i) for i in range(end - start)]
                outcomes.append(Outcome(own, []))
        if not at:
            return []
        samples = iter(self._sampler(logits_of(at), rows))
        for planned, own_samples in outcomes:
            own_samples += [next(samples) for _ in range(len(planned.drafts) + 1)]
        return outcomes

    def _forks(self, task: Task) -> list[Task]:
        """The other answers of a prompt that is now computed; those without a place in the step wait."""
        request, started = task.request, []
        for _ in range(len(request.tasks), request.params.n):
            fork = self._task(request, task.sequence.fork())
            if self.scheduler.start(fork):
                started.append(fork)
            else:
                fork.sequence.close()
                self.scheduler.add(fork)
        return started

    def _advance(self, planned: Planned, samples: list[Sample]) -> None:
        """Take the sampled tokens as far as the drafts before them hold."""
        task, drafts = planned.task, planned.drafts
        taken = 0
        for sampled in samples:
            task.add(sampled)
            taken += 1
            if task.answer.finish_reason is not None or taken > len(drafts) or sampled.token_id != drafts[taken - 1]:
                break
        if drafts and self.drafter is not None:
            self.drafter.count(len(drafts), taken - 1)
        task.sequence.truncate(len(task.token_ids) - 1)
        task.computed()
        if task.answer.finish_reason is not None:
            self._finish(task, task.answer.finish_reason)

    def _finish(self, task: Task, reason: str) -> None:
        task.complete(reason)
        self.scheduler.remove(task)
        if task.request.done:
            self._timed.discard(task.request)

    def _expire(self) -> bool:
        """End requests whose time is up with what they have; whether there were any."""
        now = time.perf_counter()
        late = [r for r in self._timed if r.deadline is not None and r.deadline <= now]
        for request in late:
            for task in request.tasks:
                if task.index not in request.completions:
                    self._finish(task, "deadline")
            for index in range(len(request.tasks), request.params.n):  # not even begun
                request.completions[index] = replace(request.completions[0])
            self._timed.discard(request)
        return bool(late)
