"""What of a quantization is on the disk already, so that it can be stopped at any moment and gone on with.

Beside the destination NAME stands the folder `.NAME.partial`:

    layer-00007.safetensors  the published tensors of block 7
    state.safetensors        the residual streams after the last block that is done, how many are, their errors,
                             and what was asked for
    model/                   the finished checkpoint, which becomes NAME by a rename

Every file is written under another name, brought to the disk and renamed, and the state after the layer it speaks of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qvl_runtime.errors import CheckpointError
from qvl_runtime.quantize.block import LinearError
from qvl_runtime.weights.save import replace, sync

Key = Mapping[str, object]  # what must be the same for a quantization to be gone on with; JSON values


class State(NamedTuple):
    """Where a quantization stands."""

    done: int  # layers
    x: Tensor  # [1 or 2, n, D], the residual streams before layer `done`
    errors: list[LinearError]


class Job:
    """The work in progress for one destination."""

    def __init__(self, destination: Path, key: Key) -> None:
        self.destination, self.home = destination, destination.with_name(f".{destination.name}.partial")
        self.model = self.home / "model"
        self._key = json.loads(json.dumps(key))

    def resume(self) -> State | None:
        """What an earlier run left, or None. Raises `CheckpointError` where that run was asked for something else."""
        self.home.mkdir(parents=True, exist_ok=True)
        if not self._state.exists():
            return None
        with safe_open(self._state, framework="pt", device="cpu") as file:
            said = json.loads(file.metadata()["job"])
            x = file.get_tensor("x").clone()
        if said["key"] != self._key:
            names = [name for name in self._key if said["key"].get(name) != self._key[name]]
            asked = ", ".join(f"{name} {said['key'].get(name)!r} instead of {self._key[name]!r}" for name in names)
            raise CheckpointError(
                f"{self.home} holds {said['done']} layers of a run with other settings ({asked:.300}): give those to "
                "go on with it, or remove the folder to start anew"
            )
        return State(said["done"], x, [LinearError(*error) for error in said["errors"]])

    def note(self, state: State, packed: Mapping[str, Tensor]) -> None:
        """A layer is done (`packed` are its tensors), or with none done the calibration rows are embedded."""
        if state.done:
            replace(self._layer(state.done - 1), lambda path: save_file(dict(packed), path))
        said = {"key": self._key, "done": state.done, "errors": state.errors}
        replace(self._state, lambda path: save_file({"x": state.x.cpu()}, path, metadata={"job": json.dumps(said)}))

    def layers(self, count: int) -> dict[str, Path]:
        """Which file each finished tensor of the first `count` layers is in."""
        found: dict[str, Path] = {}
        for path in map(self._layer, range(count)):
            with safe_open(path, framework="pt", device="cpu") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def publish(self) -> None:
        """`model` is complete: it becomes the destination."""
        refuse_existing(self.destination)
        self.model.rename(self.destination)
        sync(self.destination.parent)
        self._state.unlink()  # first: without it a folder that is half removed says nothing
        shutil.rmtree(self.home)

    @property
    def _state(self) -> Path:
        return self.home / "state.safetensors"

    def _layer(self, number: int) -> Path:
        return self.home / f"layer-{number:05}.safetensors"


def refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; choose another name or remove it first")


def mapped(path: Path, name: str) -> Tensor:
    """A tensor of a finished file."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
