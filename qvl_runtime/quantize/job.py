"""Which layers of a quantization are on the disk, so that it can be stopped at any moment and resumed.

In the `PartialFolder` of the destination, whose key holds all settings:

    layer-00007.safetensors  the published tensors of block 7
    state.safetensors        the residual streams after the last finished block, the number of finished blocks, and
                             the errors of their linears
    model/                   the finished checkpoint

Every file is written under another name, flushed to the disk and renamed; the state is written after the layer it
counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qvl_runtime.errors import CheckpointError
from qvl_runtime.quantize.block import LinearError
from qvl_runtime.weights.files import replace_file
from qvl_runtime.weights.partial import PartialFolder

Key = Mapping[str, object]  # the settings that must be equal to resume a quantization; JSON values


class State(NamedTuple):
    """The progress of a quantization."""

    done: int  # layers
    x: Tensor  # [1 or 2, n, D], the residual streams before layer `done`
    errors: list[LinearError]


class Job:
    """The work in progress for one destination. Use it in a `with` block, which holds the folder's lock."""

    def __init__(self, destination: Path, key: Key) -> None:
        self._partial = PartialFolder(destination, {"command": "qvl quantize", **key})
        self._home, self.model = self._partial.home, self._partial.model

    def __enter__(self) -> Job:
        self._partial.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._partial.__exit__(kind, error, at)

    def resume(self) -> State | None:
        """What an earlier run left, or None. Raises `CheckpointError` for layers of a run with other settings."""
        state = self._read_state()
        if self._partial.resumable:
            return state
        differences = ", ".join(self._partial.differences())
        if state is not None and differences:
            raise CheckpointError(
                f"{self._home} holds {state.done} layers of a run with other settings ({differences:.300}): use those "
                "settings to resume it, or remove the folder to start again"
            )
        self._partial.restart()
        return None

    def store(self, state: State, packed: Mapping[str, Tensor]) -> None:
        """Write a finished layer and the state after it, or, with no layer done, the embedded calibration tokens.

        packed: the published tensors of the layer.
        """
        if state.done:
            replace_file(self._layer(state.done - 1), lambda path: save_file(dict(packed), path))
        metadata = {"job": json.dumps({"done": state.done, "errors": state.errors})}
        replace_file(self._state, lambda path: save_file({"x": state.x.cpu()}, path, metadata=metadata))

    def layers(self, count: int) -> dict[str, Path]:
        """The file of each published tensor of the first `count` layers."""
        file_of: dict[str, Path] = {}
        for path in map(self._layer, range(count)):
            with safe_open(path, framework="pt", device="cpu") as file:
                file_of |= dict.fromkeys(file.keys(), path)
        return file_of

    def publish(self) -> None:
        """Rename the complete `model` to the destination, and remove the layers."""
        self._partial.publish()

    def _read_state(self) -> State | None:
        if not self._state.exists():
            return None
        with safe_open(self._state, framework="pt", device="cpu") as file:
            stored = json.loads(file.metadata()["job"])
            x = file.get_tensor("x").clone()
        return State(stored["done"], x, [LinearError(*error) for error in stored["errors"]])

    @property
    def _state(self) -> Path:
        return self._home / "state.safetensors"

    def _layer(self, number: int) -> Path:
        return self._home / f"layer-{number:05}.safetensors"


def mapped(path: Path, name: str) -> Tensor:
    """A mapped tensor of a finished file."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
