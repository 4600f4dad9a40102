"""The folder of a run in the making: saved states, the log, and at last the result, which appears as a whole.

`.NAME.partial` holds `states/step-N/state.pt`, `log.jsonl` and `model/` until the run is complete. A state is written
under another name, flushed to the disk and renamed, so that a stop at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import CheckpointError
from qvl_runtime.finetune.curve import TENSORBOARD
from qvl_runtime.weights.files import full_disk_error, sync
from qvl_runtime.weights.partial import PartialFolder

COMMAND = "qvl finetune"
LOG = "log.jsonl"


class RunFolder:
    """States and log of one run. Use it in a `with` block, which holds the lock of the folder."""

    def __init__(self, destination: Path, key: Mapping[str, object], keep: int, leads: bool = True) -> None:
        """key: what must be equal to resume; keep: states that stay on the disk; leads: whether this process writes."""
        self.partial = PartialFolder(destination, {"command": COMMAND, **key})
        self.keep, self._leads = keep, leads

    def __enter__(self) -> RunFolder:
        """Take the lock, and start a fresh folder unless there is work to resume.

        Raises `CheckpointError` for a destination that exists, for another process at work, and for the work of a run
        with other data or options.
        """
        if not self._leads:
            return self
        self.partial.__enter__()
        try:
            if not self.partial.resumable:
                if self.states():
                    raise CheckpointError(
                        f"{self.partial.home} holds a run with {', '.join(self.partial.differences())}: use the same "
                        "data and options to resume it, remove that folder, or choose another destination"
                    )
                self.partial.restart()
            for left in self._folder.glob("*.writing"):  # the process was killed while it saved
                shutil.rmtree(left)
        except BaseException:
            self.partial.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._leads:
            self.partial.__exit__(*error)

    @property
    def home(self) -> Path:
        """Where log and states are until the run is complete."""
        return self.partial.home

    @property
    def _folder(self) -> Path:
        return self.home / "states"

    def states(self) -> list[Path]:
        """The saved states, oldest first."""
        return sorted(path for path in self._folder.glob("step-*") if path.suffix != ".writing")

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the state after `step` steps. Raises `CheckpointError` for a full disk; earlier states stay."""
        import torch

        target = self._folder / f"step-{step:08}"
        writing = target.with_name(f"{target.name}.writing")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            with full_disk_error(writing / "state.pt"):
                torch.save(dict(state), writing / "state.pt")
                sync(writing / "state.pt")
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        sync(self._folder)
        for old in self.states()[: -self.keep]:
            shutil.rmtree(old)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, mapped; None if there is none."""
        import torch

        states = self.states()
        if not states:
            return None
        state: dict[str, Any] = torch.load(states[-1] / "state.pt", weights_only=True, map_location="cpu")
        return state

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        with (self.home / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The lines of the log; an incomplete last one is left out."""
        path = self.home / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def cut_log(self, step: int) -> None:
        """Drop the lines after `step` steps, which a resumed run writes once more."""
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        (self.home / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def publish(self) -> None:
        """The result in `model/` is complete: it becomes the destination, with the log and TensorBoard's files."""
        if (self.home / LOG).exists():
            shutil.copyfile(self.home / LOG, self.partial.model / LOG)
        if (self.home / TENSORBOARD).is_dir():
            (self.home / TENSORBOARD).rename(self.partial.model / TENSORBOARD)
        sync(self.partial.model)
        self.partial.publish()
