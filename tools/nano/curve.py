"""The training curve: losses and scores against minutes, from the two logs of a run."""

from __future__ import annotations

import json
from pathlib import Path

SHOWN = {
    "caption: object recalled": "objects recalled in captions",
    "caption: box IoU >= 0.5": "their boxes, IoU >= 0.5",
    "box: box IoU >= 0.5": "box on request, IoU >= 0.5",
    "questions, all": "questions",
    "relation": "of these: left/right, above/below",
    "number: digit": "digits",
    "number: whole": "whole numbers",
}


def plot(run: Path, target: Path) -> None:
    """Draw log.jsonl and scores.jsonl of a run's folder into one image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, scores = (_read(run / name) for name in ("log.jsonl", "scores.jsonl"))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for name, label in {"lm": "answers", "patch": "probe on patches", "token": "probe on image tokens"}.items():
        above.plot([e["minutes"] for e in steps], [e[name] for e in steps], label=label)
    above.set(ylabel="loss", title=f"{scores[-1]['pictures']:,} pictures, {scores[-1]['step']:,} steps")
    for name, label in SHOWN.items():
        known = [e for e in scores if name in e]
        below.plot([e["minutes"] for e in known], [100 * e[name] for e in known], marker="o", label=label)
    below.set(xlabel="minutes on 2 cores", ylabel="% right, fresh scenes", ylim=(0, 100))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=110)


def _read(path: Path) -> list[dict[str, float]]:
    """Entries in order; of steps logged twice, after a resume from an older state, the last."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [by_step for _, by_step in sorted({e["step"]: e for e in entries}.items())]
