"""The training loop: a schedule over minutes, a log, and a state on disk from which a stopped run resumes."""

from __future__ import annotations

import json
import math
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.network import Network
from qvl_runtime.prompt.tokenizer import Tokenizer

from .decoding import answers
from .network import random_network, run_batch
from .optimizer import Average, Optimizer
from .packing import CHINESE, Batch, Packer
from .probe import Probe
from .scenes import SceneConfig
from .scoring import score
from .team import Team
from .warm import take_weights


@dataclass(frozen=True, slots=True)
class Recipe:
    """The hyperparameters of a run."""

    minutes: float = 104.0  # of training, on the clock of this machine; pauses do not count
    images: int = 8  # a process and step
    processes: int = 2
    rate: float = 3e-3
    warmup: int = 50  # steps
    decay_from: float = 0.5  # share of the time at which the rate begins to fall
    floor: float = 0.02  # the last rate, as a share of the first
    probe: float = 0.5  # weight of the auxiliary loss, falling to a tenth at `probe_until`
    probe_until: float = 0.7
    average: float = 0.995
    weak: float = 0.0  # share of crowded images with the questions that a first run leaves weak: `practice`
    chinese: float = CHINESE  # share of the images with Chinese questions
    seed: int = 1
    score_every: float = 10.0  # minutes
    score_scenes: int = 100
    save_every: float = 3.0  # minutes

    def rate_at(self, share: float, step: int) -> float:
        """Share of `rate` at a share of the time: a short warm-up, constant, then linear."""
        fall = 1.0 if share < self.decay_from else max(self.floor, (1 - share) / (1 - self.decay_from))
        return min(1.0, step / self.warmup) * fall

    def probe_at(self, share: float) -> float:
        """Weight of the auxiliary loss at a share of the time."""
        return self.probe * (1 - 0.9 * min(1.0, share / self.probe_until))


class Trainer:
    """One process of a training run. Files in `folder`: state.pt, log.jsonl (steps) and scores.jsonl.

    A run without a state.pt starts from random weights, or from those of the checkpoint `start`.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tokenizer: Tokenizer,
        recipe: Recipe,
        team: Team,
        start: Path | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        torch.set_num_threads(1)
        self.folder, self.recipe, self.team = folder, recipe, team
        self.scenes = SceneConfig(side=config.visual.image_size)
        self.packer = Packer(tokenizer, config, self.scenes, weak=recipe.weak, chinese=recipe.chinese)
        self.model = random_network(config).bfloat16()
        if start is not None:
            take_weights(self.model, start)
        self.probe = Probe(config.visual.width, config.hidden_size)
        self.params = [p for m in (self.model, self.probe) for p in m.parameters() if p.requires_grad]
        self.optimizer = Optimizer(self.model, self.probe, config, recipe.rate)
        self.average = Average(((s.name, s.master) for s in self.optimizer.slots), recipe.average)
        self.step, self.seen, self.spent, self.scored = 0, 0, 0.0, 0.0
        self._resume()

    def run(self) -> None:
        """Train until the minutes are over, then save and score."""
        total, saved, recent = self.recipe.minutes * 60, self.spent, []
        batches, mark = self._batches(), time.perf_counter()
        clock = self.spent
        while clock < total:
            batch = next(batches)
            share = clock / total
            recent.append(self._learn(batch, share))
            self.spent += time.perf_counter() - mark
            mark = time.perf_counter()
            clock = self.team.average(self.params, self.spent)
            norm = self.optimizer.step(self.recipe.rate_at(share, self.step + 1), self.team)
            self.step += 1
            self.seen += self.recipe.images * self.team.size
            self.average.update(self.optimizer.slots, self.step)
            if self.team.rank:
                continue
            if self.step % 50 == 0:
                lm, patch, token = np.mean(recent, 0).round(4).tolist()
                self._log("log.jsonl", lm=lm, patch=patch, token=token, norm=round(norm, 3))
                recent = []
            if clock - saved > self.recipe.save_every * 60:
                saved = clock
                self.save()
            if clock - self.scored > self.recipe.score_every * 60:
                self.scored = clock
                self._score()
                mark = time.perf_counter()
        if self.team.rank == 0:
            self.save()
            self._score()

    def _learn(self, batch: Batch, share: float) -> list[float]:
        ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        h, patches, features = run_batch(self.model, batch)
        predicted = weights[:, :-1] > 0
        weight = weights[:, :-1][predicted]
        logits = self.model.logits(h[:, :-1][predicted]).float()
        lm = (F.cross_entropy(logits, ids[:, 1:][predicted], reduction="none") * weight).sum() / weight.sum()
        patch, token = self.probe(patches.float(), features.float(), batch.at_patch, batch.at_token)
        (lm + self.recipe.probe_at(share) * (patch + token)).backward()
        return [float(x.detach()) for x in (lm, patch, token)]

    def _batches(self) -> Iterator[Batch]:
        """Yield batches rendered in a subprocess. A batch's seed is its step: a resumed run continues the series."""
        ready = self.team.context.Queue(4)
        seed, rank, first = self.recipe.seed, self.team.rank, self.step

        def render() -> None:
            torch.set_num_threads(1)
            for step in range(first, 10**9):
                ready.put(self.packer.batch(np.random.default_rng([seed, rank, step]), self.recipe.images))

        self.team.context.Process(target=render, daemon=True).start()
        while True:
            try:
                yield ready.get(timeout=300)
            except queue.Empty:
                raise RuntimeError("the process that draws the scenes has stopped") from None

    def averaged(self) -> Network:
        """A bfloat16 copy with the averaged weights."""
        model = random_network(self.model.c)
        model.load_state_dict(self.average.tensors, strict=False)
        return model.bfloat16().eval()

    def _score(self) -> None:
        torch.set_num_threads(self.recipe.processes)
        model = self.averaged()
        tally = score(lambda *questions: answers(model, self.packer, *questions), self.scenes, self.recipe.score_scenes)
        torch.set_num_threads(1)
        self._log("scores.jsonl", **{k: round(v, 3) for k, v in tally.rates.items()})

    def _log(self, name: str, **values: float) -> None:
        entry = {"minutes": round(self.spent / 60, 2), "step": self.step, "pictures": self.seen, **values}
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    def save(self) -> None:
        """Write state.pt; a stop while it is written leaves the old one."""
        state = {
            "optimizer": self.optimizer.state(),
            "average": self.average.tensors,
            "step": self.step,
            "seen": self.seen,
            "spent": self.spent,
            "scored": self.scored,
            "torch": torch.get_rng_state(),
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.optimizer.load(state["optimizer"])
        self.average.tensors = state["average"]
        self.step, self.seen, self.spent, self.scored = (state[k] for k in ("step", "seen", "spent", "scored"))
        torch.set_rng_state(state["torch"])


def parameters(config: ModelConfig) -> int:
    """An upper bound of the parameters of model and probe, for the shared buffers."""
    model, probe = random_network(config), Probe(config.visual.width, config.hidden_size)
    return math.ceil(sum(p.numel() for m in (model, probe) for p in m.parameters()) / 4096) * 4096
