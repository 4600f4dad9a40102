"""The training loop: accumulate, clip, update, log, save, and resume bit for bit.

What a step computes depends on the options, the data and its number alone: the order of samples is drawn from the seed,
and dropout of a micro-batch from the seed, the step and its place in it. So no random state is saved, and neither a
resume nor the number of processes changes a draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qvl_kernels.util import cdiv
from qvl_runtime.errors import NumericsError
from qvl_runtime.finetune.data import Dataset, Sample
from qvl_runtime.finetune.learner import UNREADABLE, Learner
from qvl_runtime.finetune.network import Losses
from qvl_runtime.finetune.optimizer import Optimizer, rate_at
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.packing import Schedule
from qvl_runtime.finetune.parallel import Team
from qvl_runtime.finetune.run_folder import RunFolder
from qvl_runtime.finetune.sharded import is_sharded


class Measured(NamedTuple):
    """What a step gave, summed over all processes."""

    loss: float  # of the learned tokens
    targets: int  # learned tokens
    divergence: float  # of the tokens to keep, from what the model said before training
    kept: int  # tokens to keep
    rows: int  # micro-batches
    skipped: int  # samples that could not be read, or whose loss was not finite
    stops: int  # processes that were asked to stop


class StoppedError(Exception):
    """The run was asked to stop; the state after its last step is saved."""


class Trainer:
    """One run over one dataset. `run` returns once all steps are done; the trained weights are in the network."""

    def __init__(
        self,
        learner: Learner,
        optimizer: Optimizer,
        dataset: Dataset,
        options: FinetuneOptions,
        folder: RunFolder,
        team: Team | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """evaluate: scores of the network as it is, every `options.evaluate_every` steps and at the end."""
        self.learner, self.optimizer, self.dataset, self.options = learner, optimizer, dataset, options
        self.folder, self.team, self.evaluate = folder, team or Team(), evaluate
        self.steps = schedule_of(dataset, options).steps()
        self.step = self.skipped = self.faults = 0
        self._sharded = any(is_sharded(parameter) for parameter in learner.network.parameters())
        self.seconds = 0.0
        self.saved_by: int | None = None  # processes of the state that the run resumed from
        self._stop = False
        self._sinks: list[Callable[[dict[str, Any]], None]] = []

    def add_sink(self, sink: Callable[[dict[str, Any]], None]) -> None:
        """Have every line of the log handed to `sink`, too."""
        self._sinks.append(sink)

    def stop(self) -> None:
        """End the run after a step in progress: in all processes after the same one. Safe in a signal handler."""
        self._stop = True

    def resume(self) -> int:
        """Continue from the last saved state, if there is one; returns the steps that are done."""
        state = self.folder.load()
        if state is not None:
            self.optimizer.load(state["optimizer"])
            self.step, self.skipped, self.faults = state["step"], state["skipped"], state["faults"]
            self.seconds = state["seconds"]
            self.saved_by = state.get("processes")
        if not self._sharded:  # a sharded run has read all, or ended
            self._leave_out({*self.left_out, *(state or {}).get("left_out", ())})
        if self.team.leads:
            self.folder.cut_log(self.step)
        return self.step

    def _leave_out(self, indices: set[int]) -> None:
        """Leave out samples to keep that some process or an earlier part of the run could not read."""
        samples = self.dataset.samples
        if any(sample.keep for sample in samples):
            for index, flag in enumerate(self.team.totals(*(index in indices for index in range(len(samples))))):
                if flag:
                    samples[index] = replace(samples[index], kept=None)

    @property
    def left_out(self) -> list[int]:
        """The samples to keep without predictions, as their images could not be read before the first step."""
        return [i for i, sample in enumerate(self.dataset.samples) if sample.keep and sample.kept is None]

    def run(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Take all steps that are left.

        Raises `NumericsError` after too many steps in a row without a gradient, and `StoppedError` after `stop`.
        """
        self.learner.network.train()
        saved, mark = self.step, time.perf_counter()
        while self.step < len(self.steps):
            entry, stops = self._take_step(self.steps[self.step])
            self.step += 1
            now = time.perf_counter()
            self.seconds, elapsed, mark = self.seconds + now - mark, now - mark, now
            entry |= {"seconds": round(elapsed, 4), "tokens_per_s": round(entry["tokens"] / elapsed, 1)}
            every = self.options.evaluate_every
            if self.evaluate is not None and (self.step == len(self.steps) or (every and self.step % every == 0)):
                entry |= self.evaluate()
                self.learner.network.train()
                mark = time.perf_counter()
            self._log(entry)
            left = len(self.steps) - self.step
            if left and (stops or self.step % self.options.save_every == 0):
                self.save()
                saved = self.step
            progress(self.step)
            if left and stops:
                raise StoppedError(f"stopped after step {self.step} of {len(self.steps)}")
        if saved < self.step:
            self.save()

    def save(self) -> None:
        """Save what a resumed run needs."""
        state = {
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "skipped": self.skipped,
            "faults": self.faults,
            "seconds": self.seconds,
            "processes": self.team.size,
            "left_out": self.left_out,
        }
        if self.team.leads:
            self.folder.save(self.step, state)
        self.team.wait()

    def _take_step(self, rows: list[list[int]]) -> tuple[dict[str, Any], int]:
        """The line of the log, and how many processes were asked to stop."""
        samples = [[self.dataset.samples[i] for i in row] for row in rows]
        planned = sum(sample.num_targets for row in samples for sample in row)
        measured = self._accumulate(samples, planned)
        if self.team.size > 1:
            self._add_gradients()
        tokens = measured.targets + measured.kept
        done, whole = (tokens, planned) if self.options.mean == "token" else (measured.rows, len(rows))
        if 0 < done < whole:
            self.optimizer.scale(whole / done)  # the mean of what was learned
        rate = rate_at(self.step, len(self.steps), self.options)
        norm = self.optimizer.norm() if done else math.nan
        self.skipped += measured.skipped
        if math.isfinite(norm):
            self.faults = 0
            if norm > self.options.clip:
                self.optimizer.scale(self.options.clip / norm)
            self.optimizer.step(rate)
        else:
            self._fault(norm)
        entry = {
            "step": self.step + 1,
            "epoch": round((self.step + 1) / len(self.steps) * self.options.epochs, 4),
            "loss": measured.loss / measured.targets if measured.targets else None,
            "rate": rate,
            "norm": norm if math.isfinite(norm) else None,
            "tokens": sum(len(sample) for row in samples for sample in row),
            "targets": measured.targets,
            "skipped": self.skipped,
        }
        if measured.kept:
            entry["divergence"] = measured.divergence / measured.kept
        return entry, measured.stops

    def _add_gradients(self) -> None:
        """Sum the gradients over all processes; FSDP has reduced those of sharded weights to a mean."""
        for gradient in self.optimizer.gradients():
            if is_sharded(gradient):
                gradient.mul_(self.team.size)
            else:
                self.team.add([gradient])

    def _fault(self, norm: float) -> None:
        """Count a step without a finite gradient; the weights stay as they are."""
        self.optimizer.drop()
        self.faults += 1
        if self.faults >= self.options.most_faults:
            raise NumericsError(
                f"{self.faults} steps in a row had no finite gradient (norm {norm:g}), the last is step "
                f"{self.step + 1}: lower the rate of {self.options.rate:g}, or resume with dtype float32"
            )

    def _accumulate(self, rows: list[list[Sample]], planned: int) -> Measured:
        """Add up the gradients of this process's micro-batches."""
        sums = [0.0, 0, 0.0, 0, 0]  # the first fields of `Measured`
        skipped = 0
        for number, row in self._own(rows):
            if row is None:
                idle = self.learner.losses(rows[0])
                ((idle.learned + idle.kept) * 0.0).backward()  # type: ignore[no-untyped-call]
                continue
            torch.manual_seed(hash((self.options.seed, self.step, number)) % 2**63)
            samples, losses = self._losses(row)
            skipped += len(row) - len(samples)
            if losses is None:
                continue
            counts = [sum(sample.num_targets for sample in samples if sample.keep is keep) for keep in (False, True)]
            total = losses.learned + self.options.keep_weight * losses.kept
            if not bool(total.isfinite()) and not self._sharded:
                skipped += len(samples)
                continue
            weight = 1 / planned if self.options.mean == "token" else 1 / (sum(counts) * len(rows))
            (total * weight).backward()  # type: ignore[no-untyped-call]
            own = (float(losses.learned.detach()), counts[0], float(losses.kept.detach()), counts[1], 1)
            sums = [have + more for have, more in zip(sums, own, strict=True)]
        loss, targets, divergence, *others = self.team.totals(*sums, skipped, self._stop)
        return Measured(loss, int(targets), divergence, *(int(number) for number in others))

    def _losses(self, row: list[Sample]) -> tuple[list[Sample], Losses | None]:
        """The samples of a micro-batch that can be computed, and their losses: None if there are none."""
        samples = [sample for sample in row if sample.kept is not None or not sample.keep]
        try:
            return samples, self.learner.losses(samples) if samples else None
        except UNREADABLE:
            if self._sharded:
                raise  # the other processes wait for this row
        samples = self.learner.readable(samples)
        return samples, self.learner.losses(samples) if samples else None

    def _own(self, rows: list[list[Sample]]) -> Iterator[tuple[int, list[Sample] | None]]:
        """This process's micro-batches with their number; None where it has none, and helps others to gather shards."""
        size = self.team.size
        for number in range(self.team.rank, cdiv(len(rows), size) * size, size):
            if number < len(rows):
                yield number, rows[number]
            elif self._sharded:
                yield number, None

    def _log(self, entry: dict[str, Any]) -> None:
        if not self.team.leads:
            return
        self.folder.log(entry)
        for sink in self._sinks:
            sink(entry)


def schedule_of(dataset: Dataset, options: FinetuneOptions) -> Schedule:
    """The micro-batches of a run."""
    lengths = [len(sample) for sample in dataset.samples]
    pack_to = options.max_length if options.pack else None
    return Schedule(lengths, options.seed, options.epochs, options.batch, pack_to, options.accumulate)
