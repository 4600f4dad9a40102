"""Actors on a Ray cluster that answer rows: started, watched, and started again when they die."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from qvl_runtime.cluster.actor import ActorSpec, Answer, EngineActor, Versions
from qvl_runtime.cluster.connect import first_line, require
from qvl_runtime.cluster.rows import Row
from qvl_runtime.errors import ClusterError

_MAX_LOSSES = 3  # of actors in a row, for each that there should be, without an answer from any


class Ready(NamedTuple):
    """A worker can take rows."""

    worker: str


class Done(NamedTuple):
    """A worker has answered some rows."""

    worker: str
    answers: list[Answer]


class Lost(NamedTuple):
    """A worker has died, and another one is being started."""

    worker: str
    why: str


Event = Ready | Done | Lost


class ActorPool:
    """Some actors, each of which is a worker with a name of its own as long as it lives."""

    def __init__(
        self,
        ray: Any,
        spec: ActorSpec,
        actors: int,
        gpus: float,
        cpus: float,
        wait_s: float,
        kind: type[EngineActor] = EngineActor,
    ) -> None:
        """gpus, cpus: of each actor. wait_s: until the first actor has been given them. Raises `ClusterError`."""
        self._ray, self._spec, self._wait_s, self._kind = ray, spec, wait_s, kind
        self._options = {"num_gpus": gpus, "num_cpus": cpus, "max_restarts": 0, "max_concurrency": 1000}
        self._needs = f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"
        require(ray, "GPU" if gpus else "CPU", gpus or cpus)
        self._versions = Versions.here()
        self._actors: dict[str, Any] = {}  # by worker
        self._refs: dict[Any, tuple[str, str]] = {}  # what is awaited: worker, and what for
        self._number, self._losses, self._allowed = 0, 0, _MAX_LOSSES * actors
        self._began = time.monotonic()
        self._placed = False  # whether an actor has ever begun
        for _ in range(actors):
            self._start()

    def send(self, worker: str, rows: Sequence[Row]) -> None:
        """Have a worker answer some rows."""
        self._refs[self._actors[worker].answer.remote(rows)] = worker, "answer"

    def events(self) -> list[Event]:
        """Wait until something has happened, and return all that has. Raises `ClusterError` if it is hopeless."""
        while True:
            refs = list(self._refs)
            found, _ = self._ray.wait(refs, num_returns=1, timeout=1.0)
            if found:
                found, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
                events = [event for ref in found if (event := self._event(ref)) is not None]
                if events:
                    return events
            self._check_placed()

    def reports(self) -> list[dict[str, Any]]:
        """`Engine.report` of each actor that has loaded and lives, with its process's id."""
        loaded = [actor for worker, actor in self._actors.items() if (worker, "load") not in self._refs.values()]
        found: list[dict[str, Any]] = []
        for ref in [actor.report.remote() for actor in loaded]:
            with suppress(self._ray.exceptions.RayActorError):  # `events` will tell of its death
                found.append(self._ray.get(ref))
        return found

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._refs.clear()

    def _start(self) -> None:
        worker = f"actor-{self._number}"
        self._number += 1
        actor = self._ray.remote(self._kind).options(**self._options).remote(self._spec)
        self._actors[worker] = actor
        self._refs[actor.__ray_ready__.remote()] = worker, "place"
        self._refs[actor.load.remote()] = worker, "load"

    def _event(self, ref: Any) -> Event | None:
        if ref not in self._refs:  # of an actor whose death another one told
            return None
        worker, what = self._refs.pop(ref)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            return self._lost(worker, first_line(error))
        except self._ray.exceptions.RayError as error:
            raise ClusterError(f"the cluster could not run {worker}: {first_line(error)}") from error
        if what == "place":
            self._placed = True
            return None
        if what == "load":
            self._check(result)
            return Ready(worker)
        self._losses = 0
        return Done(worker, result)

    def _lost(self, worker: str, why: str) -> Lost:
        self._refs = {ref: entry for ref, entry in self._refs.items() if entry[0] != worker}
        del self._actors[worker]
        self._losses += 1
        if self._losses >= self._allowed:
            raise ClusterError(f"{self._losses} actors died one after another without an answer; the last: {why}")
        self._start()
        return Lost(worker, why)

    def _check(self, loaded: Versions | str) -> None:
        """Raise `ClusterError` if an actor cannot load, or would compute by other code."""
        if isinstance(loaded, str):
            raise ClusterError(f"an actor cannot load the model: {loaded}")
        for name, here, there in zip(Versions._fields, self._versions, loaded, strict=True):
            if here != there:
                raise ClusterError(f"an actor has {name} {there}, and this machine {here}: install the same version")

    def _check_placed(self) -> None:
        waited = time.monotonic() - self._began
        if not self._placed and waited > self._wait_s:
            raise ClusterError(
                f"no actor got its {self._needs} within {self._wait_s:g} s: others use them; "
                "wait for those, ask for fewer, or raise --ray-wait-s"
            )
