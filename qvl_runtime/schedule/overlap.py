"""Steps without a gap: the next decode step is launched before the tokens of the last one are read.

The model needs a token only as the index of an embedding, so it takes them from where the sampler left them, on the
device. While it runs, the host reads the tokens, applies stops, streams, and then samples from what the model computes:
penalties, masks and random numbers follow the tokens as ever. So a request that ends has over-run by one token at most,
of which there are only a row of the step and a slot of the cache; its row is not sampled, and the slot is free.
"""

from __future__ import annotations

import logging

import torch

from qvl_runtime.schedule.answers import Answers
from qvl_runtime.schedule.computing import Computing, Launched, Unread
from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.scheduler import Scheduler

_log = logging.getLogger("qvl_runtime")


class Overlap:
    """The step ahead, if there is one: launched within a step, to be sampled and read in the next."""

    def __init__(self, scheduler: Scheduler, answers: Answers, computing: Computing) -> None:
        self.steps = 0  # that were launched ahead
        self.lost_rows = 0  # of these: of requests that had ended, or were preempted or paused
        self._scheduler, self._answers, self._computing = scheduler, answers, computing
        self._ahead: Launched | None = None

    def launch_next(self, unread: Unread) -> None:
        """Launch the step after this one, unless it depends on its tokens."""
        sampled = unread.sampled
        if sampled is None or self._answers.due or any(o.error or o.planned.drafts for o in unread.outcomes):
            return
        rows = {outcome.planned.branch: row for row, outcome in enumerate(unread.outcomes)}
        if any(self._answers.postpones(branch) for branch in rows):  # their last block is shared once they are read
            return
        plan = self._scheduler.ahead(rows)
        if not plan:
            return
        order, tokens = [rows[planned.branch] for planned in plan], sampled.token_ids
        if order != [*range(len(tokens))]:
            tokens = tokens[to_device(torch.tensor(order), tokens.device)]
        sampled.keep()
        try:
            self._ahead = self._computing.launch(plan, tokens)
        except Exception as fault:  # the next step computes it again, and finds whose fault it is
            _log.warning("a step could not be launched ahead: %s: %s", type(fault).__name__, fault)
            return
        for planned in plan:
            planned.branch.sequence.ahead = 1
        self.steps += 1

    def land(self) -> Launched | None:
        """Return the step ahead with the branches that still want it; None if there are none.

        What it computed of the others is taken back: of all, if the runner has been used for something else since.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        kept = []
        for i, planned in enumerate(ahead.plan):
            branch, sequence = planned.branch, planned.branch.sequence
            if ahead.computed.is_valid and sequence.ahead and not branch.request.paused:
                kept.append(i)
                sequence.ahead = 0
            else:
                sequence.truncate(sequence.taken)
        self.lost_rows += len(ahead.plan) - len(kept)
        return ahead.of(kept) if kept else None

    def drop(self) -> None:
        """Let go of a step ahead of which no branch runs any more."""
        if self._ahead is not None and not self._scheduler.running:
            self.land()
