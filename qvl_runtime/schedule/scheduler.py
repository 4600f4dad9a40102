"""The scheduler: which tokens of which answers go into the next step. It knows blocks and budgets, no tensors.

Policy. First come, first served: every choice is made in order of arrival, and when blocks run out the latest arrival
gives way, so the oldest request always gets on and none can starve. Answers that decode go before prompts that are
prefilled, so that no stream stalls behind a long prompt; prompts take what is left of the budget, in chunks.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from qvl_runtime.errors import ConfigError
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.request import Branch
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


class ScheduledBranch(NamedTuple):
    """A branch's part of a step: its next `known` tokens, then drafts to be verified."""

    branch: Branch
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
        start = self.branch.sequence.length
        return [*self.branch.token_ids[start : start + self.known], *self.drafts]


class Scheduler:
    """Holds every branch from `add` until `remove`: waiting without blocks, or running with them."""

    def __init__(self, cache: KVCache, limits: StepLimits, drafter: Drafter | None = None) -> None:
        self.waiting: list[Branch] = []  # in order
        self.running: list[Branch] = []  # in order
        self.preemptions = 0
        self._cache, self._limits, self._drafter = cache, limits, drafter

    def add(self, branch: Branch) -> None:
        insort(self.waiting, branch, key=lambda t: t.order)

    def start(self, branch: Branch) -> bool:
        """Let a branch that has its blocks already, by a fork, run at once; False where there is no place for it."""
        if len(self.running) >= self._limits.running:
            return False
        self._run(branch)
        return True

    def remove(self, branch: Branch) -> None:
        """Forget a branch, whose blocks are free from now on; one that is not here is none of its business."""
        for branches in (self.waiting, self.running):
            if branch in branches:
                branches.remove(branch)
        branch.running = False
        branch.sequence.close()
        branch.features.clear()

    def schedule(self) -> list[ScheduledBranch]:
        """The next step, in which each branch has its blocks; empty where nothing can be done."""
        plan: dict[Branch, ScheduledBranch] = {}
        budget, before = self._limits.tokens, self.preemptions
        ready = [branch for branch in self.running if not branch.request.held]
        for branch in sorted(ready, key=lambda t: t.pending > 1):  # stable: in order among the like
            count, preemptions = min(branch.pending, budget), self.preemptions
            if count == 0 or not self._make_room(branch, count, plan):
                continue
            plan[branch] = self._reserved(branch, count, budget)
            budget -= plan[branch].size
            if self.preemptions > preemptions:  # what the victims had of the budget is there again
                budget = self._limits.tokens - sum(planned.size for planned in plan.values())
        if self.preemptions == before:
            self._admit(plan, budget)
        return list(plan.values())

    def make_room(self, blocks: int) -> None:
        """Preempt the latest arrivals until `blocks` blocks can be allocated."""
        while self._cache.pool.available < blocks and self.running:
            self._preempt(self.running[-1])

    def _admit(self, plan: dict[Branch, ScheduledBranch], budget: int) -> None:
        """Start waiting branches while there is room for the whole of what they know and a block for each that runs."""
        while budget and self.waiting and len(self.running) < self._limits.running:
            candidates = islice(self.waiting, self._limits.running)
            branch = next((t for t in candidates if not (t.request.held or self._better_later(t))), None)
            if branch is None:
                return
            found = branch.sequence.find_prefix(branch.token_ids, branch.spans)
            if branch.sequence.needed(branch.pending) + len(self.running) > self._cache.pool.available:
                branch.sequence.close()
                if self.running:
                    return
                found = 0  # alone it does fit, if it need not copy a block that it found
            self._count(branch, found)
            self.waiting.remove(branch)
            self._run(branch)
            count = min(branch.pending, budget)
            plan[branch] = self._reserved(branch, count, 0)
            budget -= count

    def _better_later(self, branch: Branch) -> bool:
        """Whether a prompt that is being prefilled begins as this one does, its first image included.

        Waiting for it, a step or a few, saves computing the image's keys and values again.
        """
        if self._cache.prefixes is None or not branch.spans:
            return False
        span = branch.spans[0]
        return any(
            other.pending > 1
            and not other.request.held
            and other.spans
            and (other.spans[0].start, other.spans[0].image.digest) == (span.start, span.image.digest)
            and other.sequence.root == branch.sequence.root
            and other.token_ids[: span.start] == branch.token_ids[: span.start]
            for other in self.running
        )

    def _count(self, branch: Branch, found: int) -> None:
        """For the hit rate and the usage: a branch that was preempted has been counted."""
        if not branch.output.token_ids and branch.index == 0:
            branch.request.cached_tokens = found
            if self._cache.prefixes is not None:
                self._cache.prefixes.count(len(branch.token_ids), found)

    def _reserved(self, branch: Branch, count: int, budget: int) -> ScheduledBranch:
        """Reserve the blocks of a branch's part of the step; drafts only if they preempt no other branch."""
        drafts: tuple[int, ...] = ()
        if self._drafter is not None and branch.pending == 1 and branch.sampling_state.foreseeable:
            room = min(budget - count, branch.output.room - 1)
            drafts = self._drafter.propose(branch.token_ids, room)
            if branch.sequence.needed(count + len(drafts)) > self._cache.pool.available:
                drafts = ()
        branch.sequence.reserve(count + len(drafts))
        return ScheduledBranch(branch, count, drafts, samples=count == branch.pending)

    def _make_room(self, branch: Branch, count: int, plan: dict[Branch, ScheduledBranch]) -> bool:
        """Free blocks for a branch; False where it is one that has given way, now or earlier in this step."""
        while branch.running and branch.sequence.needed(count) > self._cache.pool.available:
            victim = self.running[-1]
            plan.pop(victim, None)
            self._preempt(victim)
        return branch.running

    def _run(self, branch: Branch) -> None:
        branch.running = True
        insort(self.running, branch, key=lambda t: t.order)

    def _preempt(self, branch: Branch) -> None:
        """Back to the queue without blocks: it will compute its tokens again, save what the prefix cache still has."""
        self.running.remove(branch)
        branch.running = False
        branch.sequence.close()
        branch.features.clear()
        self.preemptions += 1
        self.add(branch)
