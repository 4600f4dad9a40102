"""The plot of a run, and TensorBoard: what it is given, and that its files stay with the result."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from PIL import Image

from qvl_runtime.finetune.curve import draw_curve, smoothed, tensorboard_sink
from qvl_runtime.finetune.run import Finetuning
from tests.finetune.test_trainer import QUICK, StopError, data, stop_after

__all__ = ["data"]
pytestmark = pytest.mark.cpu


class FakeWriter:
    """Takes what TensorBoard's SummaryWriter takes, into a file of its folder."""

    made: ClassVar[list[FakeWriter]] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.scalars = Path(folder), purge_step, list[tuple[str, float, int]]()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        (self.folder / f"events.{len(self.made)}").write_text(str(len(self.scalars)))


def test_tensorboard_gets_the_log_and_its_files_stay(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "tensorboard" else found(name))
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(FakeWriter, "made", [])
    with pytest.raises(StopError):
        Finetuning.open(source, data, tmp_path / "out", QUICK).run(progress=stop_after(3))
    entries = Finetuning.open(source, data, tmp_path / "out", QUICK).run()
    first, second = FakeWriter.made
    assert (first.purge_step, second.purge_step) == (None, 3), "a state was saved after two steps"
    losses = [(value, step) for name, value, step in second.scalars if name == "loss"]
    assert losses == [(entry["loss"], entry["step"]) for entry in entries[2:]]
    assert {name for name, _, _ in first.scalars} >= {"loss", "rate", "norm", "tokens_per_s"}
    assert sorted(path.name for path in (tmp_path / "out" / "tensorboard").iterdir()) == ["events.1", "events.2"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard: pip install it")
def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # resumed after two steps
        sink = tensorboard_sink(tmp_path, done)
        assert sink is not None
        for step in steps:
            sink({"step": step, "epoch": 0.5, "loss": step + done / 8, "norm": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3.25), (4, 4.25)]


def test_curves_are_drawn(tmp_path: Path) -> None:
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    entries = [{"step": n, "loss": None if n == 2 else 1 / n, "rate": 0.1} for n in range(1, 5)]
    entries[-1]["held_out_loss"] = 0.5
    if draw_curve(entries, tmp_path / "curve.png"):
        assert Image.open(tmp_path / "curve.png").width > 400
