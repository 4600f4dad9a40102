"""Plots of a report: a radar of all tasks against the published figures, and a bar for each score of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qvl_runtime.errors import ConfigError
from qvl_runtime.evaluate.report import TaskReport


def check_plots() -> None:
    """Raise `ConfigError` where there is no matplotlib, before hours are spent on what would be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'qvl-runtime[plot]'")


def plot(reports: Sequence[TaskReport], folder: Path) -> list[Path]:
    """Draw radar.png, with three tasks or more, and a TASK.png each. Raises `ConfigError` without matplotlib."""
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    scored = [report for report in reports if report.scores]
    paths = [_bars(report, folder / f"{report.run.task.name}.png") for report in scored]
    if len(scored) >= 3:
        paths.insert(0, _radar(scored, folder / "radar.png"))
    return paths


def _radar(reports: Sequence[TaskReport], path: Path) -> Path:
    """Each task's headline as a share of the most that is possible, and the published one's."""
    from matplotlib import pyplot

    names = [report.run.task.title for report in reports]
    most = [report.run.task.metric.out_of if report.run.task.metric else 100.0 for report in reports]
    if any(report.run.task.name in ("flickr", "nocaps") for report in reports):
        most = [150.0 if m == 1000.0 else m for m in most]  # CIDEr-D could reach 1000; captions of people have some 90
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    figure = pyplot.figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    lines: dict[str, list[float | None]] = {
        "this run": [report.scores[0].value for report in reports],
        "published": [report.scores[0].published for report in reports],
    }
    for label, values in lines.items():
        shares = [math.nan if v is None else 100 * v / m for v, m in zip(values, most, strict=True)]
        if not all(math.isnan(share) for share in shares):
            axes.plot([*angles, angles[0]], [*shares, shares[0]], marker="o", label=label)
    axes.set_xticks(angles, names)
    axes.set_ylim(0, 100)
    axes.set_title("percent of the most that is possible (CIDEr-D: of 150)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(report: TaskReport, path: Path) -> Path:
    """Each score with its 95 % interval; a line marks the published one."""
    from matplotlib import pyplot

    scores = report.scores
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.4 * len(scores)), layout="constrained")
    places = range(len(scores))
    spans = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
    axes.barh(places, [s.value for s in scores], xerr=[[max(0.0, v) for v in side] for side in spans], color="tab:blue")
    for place, score in zip(places, scores, strict=True):
        if score.published is not None:
            axes.plot([score.published] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_yticks(places, [score.name for score in scores])
    axes.invert_yaxis()
    axes.set_title(f"{report.run.task.title}: 95 % intervals; black: published")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
