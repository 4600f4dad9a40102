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
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from qvl_runtime.errors import CheckpointError
from qvl_runtime.quantize.block import LinearError
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.weights.files import replace_file
from qvl_runtime.weights.partial import PartialFolder
from qvl_runtime.weights.shards import Shard, open_shard

COMMAND = "qvl quantize"
Key = Mapping[str, object]  # the settings that must be equal to resume a quantization; JSON values


class State(NamedTuple):
    """The progress of a quantization."""

    done: int  # layers
    x: Tensor  # [1 or 2, n, D], the residual streams before layer `done`
    errors: list[LinearError]


class Job:
    """The work in progress for one destination. Use it in a `with` block, which holds the folder's lock."""

    def __init__(self, destination: Path, key: Key) -> None:
        self._partial = PartialFolder(destination, {"command": COMMAND, **key})
        self._home, self.model = self._partial.home, self._partial.model

    def __enter__(self) -> Job:
        self._partial.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._partial.__exit__(kind, error, at)

    def resume(self, shape: tuple[int, ...], layers: int) -> State | None:
        """What an earlier run left, or None.

        shape: of the residual streams; layers: of the model. Raises `CheckpointError` for work of a run with other
        settings, and for damaged work.
        """
        if self._partial.resumable:
            return self._read_state(shape, layers)
        differences = ", ".join(self._partial.differences())
        if differences and self._state.exists():
            raise CheckpointError(
                f"{self._home} holds {self._num_layers()} layers of a run with other settings ({differences:.300}): "
                "use those settings to resume it, or remove the folder to start again"
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
        return {name: path for path in map(self._layer, range(count)) for name in self._open(path).infos}

    def publish(self) -> None:
        """Rename the complete `model` to the destination, and remove the layers."""
        self._partial.publish()

    def _read_state(self, shape: tuple[int, ...], layers: int) -> State | None:
        if not self._state.exists():
            return None
        shard = self._open(self._state)
        text = shard.metadata.get("job", "")
        stored = parse_json(text, f"the progress in {self._state}", CheckpointError, self._way_out)
        progress = _progress(stored)
        if progress is None or progress[0] > layers or set(shard.infos) != {"x"}:
            raise CheckpointError(f"the progress in {self._state} is damaged: {self._way_out}")
        if shard.infos["x"].shape != shape:
            raise CheckpointError(
                f"{self._state} holds activations of shape {shard.infos['x'].shape}; expected {shape}: {self._way_out}"
            )
        done, errors = progress
        for number in range(done):
            self._open(self._layer(number))
        return State(done, shard.tensor("x").clone(), errors)

    def _open(self, path: Path) -> Shard:
        try:
            return open_shard(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is missing or damaged: {self._way_out}") from error

    @property
    def _way_out(self) -> str:
        return f"remove {self._home} to start again"

    def _num_layers(self) -> int:
        return len(list(self._home.glob("layer-*.safetensors")))

    @property
    def _state(self) -> Path:
        return self._home / "state.safetensors"

    def _layer(self, number: int) -> Path:
        return self._home / f"layer-{number:05}.safetensors"


def mapped(path: Path, name: str) -> Tensor:
    """A mapped tensor of a finished file."""
    return open_shard(path).tensor(name)


def _progress(stored: object) -> tuple[int, list[LinearError]] | None:
    """The finished layers and their errors as `Job.store` wrote them; None for any other JSON value."""
    if not isinstance(stored, dict) or not isinstance(stored.get("errors"), list):
        return None
    done, errors = stored.get("done"), stored["errors"]
    if type(done) is not int or done < 0 or not all(isinstance(error, list) for error in errors):
        return None
    number = (int, float)
    kinds: tuple[Any, ...] = (int, str, number, number, number, number)
    for error in errors:
        if len(error) != len(kinds) or not all(isinstance(v, kind) for v, kind in zip(error, kinds, strict=True)):
            return None
    return done, [LinearError(*error) for error in errors]
