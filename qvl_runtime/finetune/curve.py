"""The curve of a run: a plot of loss and learning rate, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"  # folder of its event files
SMOOTHING = 0.9  # of the drawn loss: an exponential average


def draw_curve(entries: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot loss, held-out loss and learning rate over the steps; returns False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None or not entries:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    known = [entry for entry in entries if entry["loss"] is not None]
    steps, losses = [entry["step"] for entry in known], [entry["loss"] for entry in known]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color="tab:blue", label="loss")
    for name, color in (("held_out_loss", "tab:orange"),):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a token")
    axes.set_ylim(bottom=0)
    rates = axes.twinx()
    rates.plot([e["step"] for e in entries], [e["rate"] for e in entries], color="tab:gray", linewidth=0.9)
    rates.set_ylabel("learning rate", color="tab:gray")
    rates.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential average of values, without a bias towards the first."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        result.append(total / weight)
    return result


def tensorboard_sink(folder: Path, done: int = 0) -> Callable[[dict[str, Any]], None] | None:
    """A function that writes log lines into FOLDER/tensorboard, or None where TensorBoard is not installed.

    done: steps of the state that a run resumes from; what was written of later ones is shown no more.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1 if done else None)

    def write(entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name not in ("step", "epoch") and value is not None:
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return write
