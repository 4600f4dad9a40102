"""The scheduler: which tokens of which answers go into the next step. It knows blocks and budgets, no tensors.

Policy. First come, first served: every choice is made in order of arrival, and when blocks run out the latest arrival
gives way, so the oldest request always gets on and none can starve. Answers that decode go before prompts that are
prefilled, so that nobody's stream stalls behind a long prompt; prompts take what is left of the budget, in chunks.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from qvl_runtime.errors import ConfigError
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.request import Task
from qvl_runtime.schedule.speculative import Drafter


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold."""

    tokens: int = 1024  # prefill and decode together
    running: int = 64  # answers

    def __post_init__(self) -> None:
        if not 0 < self.running <= self.tokens:
            raise ConfigError(
                f"max_running is {self.running} and max_step_tokens {self.tokens}; "
                "expected at least 1, and a token for each"
            )


class Planned(NamedTuple):
    """A task's part of a step: its next `known` tokens, then drafts to be verified."""

    task: Task
    known: int
    drafts: tuple[int, ...] = ()
    samples: bool = True  # the step reaches the last known token, so that a new one comes out

    @property
    def size(self) -> int:
        """What it takes of the step's budget."""
        return self.known + len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        """What to compute; to be asked before it is."""
        start = self.task.sequence.length
        return [*self.task.token_ids[start : start + self.known], *self.drafts]


class Scheduler:
    """Holds every task from `add` until `remove`: waiting without blocks, or running with them."""

    def __init__(self, cache: KVCache, limits: StepLimits, drafter: Drafter | None = None) -> None:
        self.waiting: list[Task] = []  # in order
        self.running: list[Task] = []  # in order
        self.preemptions = 0
        self._cache, self._limits, self._drafter = cache, limits, drafter

    def add(self, task: Task) -> None:
        insort(self.waiting, task, key=lambda t: t.order)

    def start(self, task: Task) -> bool:
        """Let a task that has its blocks already, by a fork, run at once; False where there is no place for it."""
        if len(self.running) >= self._limits.running:
            return False
        self._run(task)
        return True

    def remove(self, task: Task) -> None:
        """Forget a task, whose blocks are free from now on; one that is not here is none of its business."""
        for tasks in (self.waiting, self.running):
            if task in tasks:
                tasks.remove(task)
        task.running = False
        task.sequence.close()
        task.features.clear()

    def schedule(self) -> list[Planned]:
        """The next step, in which each task has its blocks; empty where nothing can be done."""
        plan: dict[Task, Planned] = {}
        budget, before = self._limits.tokens, self.preemptions
        ready = [task for task in self.running if not task.request.held]
        for task in sorted(ready, key=lambda t: t.pending > 1):  # stable: in order among the like
            count, preemptions = min(task.pending, budget), self.preemptions
            if count == 0 or not self._make_room(task, count, plan):
                continue
            plan[task] = self._reserved(task, count, budget)
            budget -= plan[task].size
            if self.preemptions > preemptions:  # what the victims had of the budget is there again
                budget = self._limits.tokens - sum(planned.size for planned in plan.values())
        if self.preemptions == before:
            self._admit(plan, budget)
        return list(plan.values())

    def make_room(self, blocks: int) -> None:
        """Have so many blocks to allocate, sending the latest arrivals back to the queue as far as it takes."""
        while self._cache.pool.available < blocks and self.running:
            self._preempt(self.running[-1])

    def _admit(self, plan: dict[Task, Planned], budget: int) -> None:
        """Start waiting tasks while there is room for the whole of what they know and a block for each that runs."""
        while budget and self.waiting and len(self.running) < self._limits.running:
            candidates = islice(self.waiting, self._limits.running)
            task = next((t for t in candidates if not (t.request.held or self._better_later(t))), None)
            if task is None:
                return
            found = task.sequence.find_prefix(task.token_ids, task.spans)
            if task.sequence.needed(task.pending) + len(self.running) > self._cache.pool.available:
                task.sequence.close()
                if self.running:
                    return
                found = 0  # alone it does fit, if it need not copy a block that it found
            self._count(task, found)
            self.waiting.remove(task)
            self._run(task)
            count = min(task.pending, budget)
            plan[task] = self._reserved(task, count, 0)
            budget -= count

    def _better_later(self, task: Task) -> bool:
        """Whether a prompt that is being prefilled begins as this one does, its first image included.

        Waiting for it, a step or a few, saves computing the image's keys and values again.
        """
        if self._cache.prefixes is None or not task.spans:
            return False
        span = task.spans[0]
        return any(
            other.pending > 1
            and not other.request.held
            and other.spans
            and (other.spans[0].start, other.spans[0].image.digest) == (span.start, span.image.digest)
            and other.sequence.root == task.sequence.root
            and other.token_ids[: span.start] == task.token_ids[: span.start]
            for other in self.running
        )

    def _count(self, task: Task, found: int) -> None:
        """For the hit rate and the usage: a task that was preempted has been counted."""
        if not task.answer.token_ids and task.index == 0:
            task.request.cached_tokens = found
            if self._cache.prefixes is not None:
                self._cache.prefixes.count(len(task.token_ids), found)

    def _reserved(self, task: Task, count: int, budget: int) -> Planned:
        """The task's part, with its blocks; drafts only where they push nobody out."""
        drafts: tuple[int, ...] = ()
        if self._drafter is not None and task.pending == 1 and task.draws.foreseeable:
            room = min(budget - count, task.answer.room - 1)
            drafts = self._drafter.propose(task.token_ids, room)
            if task.sequence.needed(count + len(drafts)) > self._cache.pool.available:
                drafts = ()
        task.sequence.reserve(count + len(drafts))
        return Planned(task, count, drafts, samples=count == task.pending)

    def _make_room(self, task: Task, count: int, plan: dict[Task, Planned]) -> bool:
        """Free blocks for a task; False where it is one that has given way, now or earlier in this step."""
        while task.running and task.sequence.needed(count) > self._cache.pool.available:
            victim = self.running[-1]
            plan.pop(victim, None)
            self._preempt(victim)
        return task.running

    def _run(self, task: Task) -> None:
        task.running = True
        insort(self.running, task, key=lambda t: t.order)

    def _preempt(self, task: Task) -> None:
        """Back to the queue without blocks: it will compute its tokens again, save what the prefix cache still has."""
        self.running.remove(task)
        task.running = False
        task.sequence.close()
        task.features.clear()
        self.preemptions += 1
        self.add(task)
