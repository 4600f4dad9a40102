"""The scheduler chooses the tokens of each step. It knows blocks and budgets, no tensors.

The policy is first come, first served (FCFS): every choice is made in order of arrival, and when blocks run out, the
latest arrival is preempted. The oldest request always advances, so none can starve. The further answers of a request
with n > 1 come later in this order than a few requests after it, and give up their slot to these. Decoding precedes
prefill, so that no stream stalls behind a long prompt; prompts use the rest of the budget, in chunks (chunked prefill).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from qvl_runtime.errors import ConfigError
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.request import Branch
from qvl_runtime.schedule.speculative import Drafter


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The limits of one step. Raises `ConfigError` for a value out of range."""

    tokens: int = 1024  # prefill and decode together (max_step_tokens)
    running: int = 64  # answers that take part (max_running)

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
    samples: bool = True  # whether the step reaches the last known token, so that a new one is sampled
    forced: bool = False  # whether the drafts are what the branch's constraint leaves no choice about

    @property
    def size(self) -> int:
        """The tokens of the step's budget that it uses."""
        return self.known + len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute. Valid until the sequence grows."""
        start = self.branch.sequence.length
        return [*self.branch.token_ids[start : start + self.known], *self.drafts]


class Scheduler:
    """Holds every branch from `add` to `remove`: waiting without blocks, or running with them."""

    def __init__(self, cache: KVCache, limits: StepLimits, drafter: Drafter | None = None) -> None:
        self.waiting: list[Branch] = []  # in order
        self.running: list[Branch] = []  # in order
        self.preemptions = 0
        self.least_forced = 1  # tokens without a choice, in a row, that are computed in one step
        self.yielding = False  # whether further answers sit out a step that may give a request its first token
        self._yielded = False  # whether they sat out the last step: never two in a row
        self._refused: tuple[object, int] = None, 0  # the order of a branch that lacked blocks, and how many were spare
        self.current: Branch | None = None  # whose turn it is in `schedule`, or was when that raised
        self._cache, self._limits, self._drafter = cache, limits, drafter

    def add(self, branch: Branch) -> None:
        """Queue a branch in order of arrival."""
        insort(self.waiting, branch, key=lambda branch: branch.order)

    @property
    def free_slots(self) -> int:
        """How many more answers may run, up to max_running."""
        return self._limits.running - len(self.running)

    def start(self, branch: Branch) -> None:
        """Run a forked branch, which already has its blocks, at once. There must be a slot."""
        self._run(branch)

    def remove(self, branch: Branch) -> None:
        """Remove a branch and free its blocks; a branch that is not queued or running is only closed."""
        for branches in (self.waiting, self.running):
            if branch in branches:
                branches.remove(branch)
        branch.running = False
        branch.sequence.close()
        branch.features.clear()

    def schedule(self) -> list[ScheduledBranch]:
        """Plan the next step and reserve the blocks of each branch in it; empty if no branch can advance."""
        self._yielded = self.yielding and not self._yielded and self._awaits_first_token()
        plan = self._schedule([branch for branch in self.running if not (self._yielded and branch.index)])
        return self._schedule(self.running) if self._yielded and not plan else plan

    def _awaits_first_token(self) -> bool:
        return any(not (b.index or b.output.token_ids) for b in chain(self.waiting, self.running))

    def _schedule(self, running: Sequence[Branch]) -> list[ScheduledBranch]:
        plan: dict[Branch, ScheduledBranch] = {}
        budget, before = self._limits.tokens, self.preemptions
        ready = [branch for branch in running if not branch.request.paused]
        for branch in sorted(
            ready, key=lambda branch: branch.pending > 1
        ):  # decodes first; stable, so in order of arrival within each kind
            self.current = branch
            count, preemptions = min(branch.pending, budget), self.preemptions
            if count == 0 or not self._free_blocks(branch, count, plan):
                continue
            plan[branch] = self._schedule_branch(branch, count, budget)
            budget -= plan[branch].size
            if self.preemptions > preemptions:  # the victims' tokens return to the budget
                budget = self._limits.tokens - sum(planned.size for planned in plan.values())
        if self.preemptions == before:
            self._admit(plan, budget)
        self.current = None
        return list(plan.values())

    def ahead(self, unread: Container[Branch]) -> list[ScheduledBranch]:
        """Plan the next step while the tokens of the last are `unread`: each branch computes its own, to be continued.

        Empty where the next step depends on them, and is `schedule`'s: if a branch has anything else to compute or may
        have drafts, if a waiting one may start, or if blocks run out.
        """
        ready = [branch for branch in self.running if not branch.request.paused]
        if any(b.pending or b not in unread or self._may_draft(b) for b in ready) or self._may_admit():
            return []
        plan = [ScheduledBranch(b, 1) for b in ready if b.output.remaining > 1]  # others end with the unread token
        if sum(p.branch.sequence.needed(1) for p in plan) > self._cache.pool.available:
            return []
        for planned in plan:
            planned.branch.sequence.reserve(1)
        return plan

    def _may_draft(self, branch: Branch) -> bool:
        """Whether the branch may have drafts once its unread token is known; of forced ones, that one is the first."""
        constraint = branch.sampling_state.constraint
        if not branch.drafting:
            return False
        return self._drafter is not None or (constraint is not None and len(constraint.forced()) > self.least_forced)

    def _may_admit(self) -> bool:
        """Whether `schedule` might start a waiting branch, or have others sit out the step for one."""
        waiting = next((b for b in islice(self.waiting, self._limits.running) if not b.request.paused), None)
        if waiting is None:
            return False
        if self.yielding and any(branch.index for branch in self.running):
            return True
        if not self.free_slots and self._further_answer_after(waiting) is None:
            return False
        spare = self._cache.pool.available - len(self.running)
        order, lacking = self._refused
        return order != waiting.order or spare > lacking

    def make_room(self, blocks: int) -> None:
        """Preempt the latest arrivals until `blocks` blocks can be allocated."""
        while self._cache.pool.available < blocks and self.running:
            self._preempt(self.running[-1])

    def _admit(self, plan: dict[Branch, ScheduledBranch], budget: int) -> None:
        """Start waiting branches whose tokens fit in the free blocks, less one block for each running branch."""
        while budget and self.waiting:
            candidates = islice(self.waiting, self._limits.running)
            branch = next((b for b in candidates if not (b.request.paused or self._waits_for_prefix(b))), None)
            if branch is None:
                return
            self.current = branch
            if not self.free_slots:
                if (victim := self._further_answer_after(branch)) is None:
                    return
                budget += plan.pop(victim).size if victim in plan else 0
                self._preempt(victim)
            cached = branch.find_prefix()
            if branch.sequence.needed(branch.pending) + len(self.running) > self._cache.pool.available:
                branch.sequence.close()
                if self.running:
                    self._refused = branch.order, self._cache.pool.available - len(self.running)
                    return
                cached = 0  # alone it fits, unless it must copy a cached block
            self._count(branch, cached)
            self.waiting.remove(branch)
            self._run(branch)
            count = min(branch.pending, budget)
            plan[branch] = self._schedule_branch(branch, count, 0)
            budget -= count

    def _further_answer_after(self, branch: Branch) -> Branch | None:
        """Return the last running answer that is not the first of its request, if its turn is after `branch`'s."""
        further = next((other for other in reversed(self.running) if other.index), None)
        return further if further is not None and further.order > branch.order else None

    def _waits_for_prefix(self, branch: Branch) -> bool:
        """Whether a prompt that is being prefilled has the same prefix, up to and including the first image.

        Waiting for it, for one or a few steps, avoids computing the image's keys and values twice.
        """
        if self._cache.prefixes is None or not branch.spans:
            return False
        span = branch.spans[0]
        return any(
            other.pending > 1
            and not other.request.paused
            and other.spans
            and (other.spans[0].start, other.spans[0].image.digest) == (span.start, span.image.digest)
            and other.sequence.root == branch.sequence.root
            and other.token_ids[: span.start] == branch.token_ids[: span.start]
            for other in self.running
        )

    def _count(self, branch: Branch, cached: int) -> None:
        """Count cached tokens for hit rate and usage, once for each request: not again after a preemption."""
        if not branch.output.token_ids and branch.index == 0:
            branch.request.cached_tokens = cached
            if self._cache.prefixes is not None:
                self._cache.prefixes.count(len(branch.token_ids), cached)

    def _schedule_branch(self, branch: Branch, count: int, budget: int) -> ScheduledBranch:
        """Reserve the blocks of a branch's part of the step; drafts only if they preempt no other branch."""
        drafts: tuple[int, ...] = ()
        forced = False
        if branch.pending == 1 and branch.drafting:
            max_tokens = min(budget - count, branch.output.remaining - 1)
            drafts, forced = branch.sampling_state.draft(
                lambda: self._propose(branch, max_tokens), max_tokens, self.least_forced
            )
            if drafts and branch.sequence.needed(count + len(drafts)) > self._cache.pool.available:
                drafts = ()
        branch.sequence.reserve(count + len(drafts))
        return ScheduledBranch(branch, count, drafts, samples=count == branch.pending, forced=forced)

    def _propose(self, branch: Branch, max_tokens: int) -> tuple[int, ...]:
        return () if self._drafter is None else self._drafter.propose(branch.token_ids, max_tokens)

    def _free_blocks(self, branch: Branch, count: int, plan: dict[Branch, ScheduledBranch]) -> bool:
        """Free blocks for a branch. Return False if the branch was itself preempted, now or earlier in this step."""
        while branch.running and branch.sequence.needed(count) > self._cache.pool.available:
            victim = self.running[-1]
            plan.pop(victim, None)
            self._preempt(victim)
        return branch.running

    def _run(self, branch: Branch) -> None:
        branch.running = True
        insort(self.running, branch, key=lambda branch: branch.order)

    def _preempt(self, branch: Branch) -> None:
        """Return a branch to the queue without blocks; later it recomputes what the prefix cache no longer holds."""
        self.running.remove(branch)
        branch.running = False
        branch.sequence.close()
        branch.features.clear()
        self.preemptions += 1
        self.add(branch)
