"""Fit the confidence of boxes on boxes with known answers, and measure how well it holds on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.box_calibration import BoxCalibration, features
from qvl_runtime.prompt.boxes import Box, BoxScores

BINS = 10
RIDGE = 1e-4  # of the weights: keeps them finite where the scores tell all right boxes from all wrong ones
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judged:
    """A box that the engine found, and its overlap with the right one, 0 where the phrase names nothing."""

    box: Box
    iou: float


class Bin(NamedTuple):
    """The boxes whose confidence lies in one range."""

    boxes: int
    confidence: float  # mean
    accuracy: float  # share that is right


def fit(judged: Sequence[Judged], iou: float = 0.5, question: str | None = None) -> BoxCalibration:
    """Fit the calibration on every second box, and measure it on the others, which are held out.

    Raises `PromptError` if one half has no right or no wrong boxes, from which nothing can be learned.
    """
    scored = [(box.box.details, box.iou >= iou) for box in judged if box.box.details is not None]
    halves = scored[::2], scored[1::2]
    for name, half in zip(("fitted on", "held out"), halves, strict=True):
        correct = sum(is_right for _, is_right in half)
        if not 0 < correct < len(half):
            raise PromptError(
                f"of {len(half)} boxes to be {name}, {correct} are right at an IoU of {iou:g}; expected right and "
                "wrong ones: add phrases that name nothing (with a box of null), harder images, or raise the IoU"
            )
    fitted, held_out = halves
    weights = _logistic([scores for scores, _ in fitted], [is_right for _, is_right in fitted])
    found = BoxCalibration(tuple(weights[:-1]), float(weights[-1]), iou, len(fitted), question=question)
    confidence = [found.confidence(scores) for scores, _ in held_out]
    right = [is_right for _, is_right in held_out]
    return BoxCalibration(
        found.weights, found.bias, iou, len(fitted), len(held_out), expected_error(confidence, right),
        ranking(confidence, right), question,
    )  # fmt: skip


def _logistic(scores: Sequence[BoxScores], right: Sequence[bool]) -> list[float]:
    """Weights and bias of a logistic regression, by Newton's method with a ridge on the weights."""
    x = np.array([[*features(one), 1.0] for one in scores])
    mean, scale = x.mean(0), x.std(0)
    mean[-1], scale[-1] = 0.0, 1.0
    told = scale > 1e-3  # a score that is the same for all boxes tells nothing about them
    z, y = np.where(told, (x - mean) / np.where(told, scale, 1.0), 0.0), np.array(right, float)
    weights = np.zeros(z.shape[1])
    ridge = np.full(z.shape[1], RIDGE * len(z))
    ridge[-1] = 1e-9
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(z @ weights, -30, 30)))
        gradient = z.T @ (p - y) + ridge * weights
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if float(np.abs(step).max()) < 1e-10:
            break
    plain = np.where(told, weights / np.where(told, scale, 1.0), 0.0)
    plain[-1] = weights[-1] - float((plain * mean)[:-1].sum())
    return [float(value) for value in plain]


def reliability(confidence: Sequence[float], right: Iterable[bool]) -> list[Bin]:
    """The boxes in ten ranges of confidence of equal width, the empty ones left out."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for value, is_right in zip(confidence, right, strict=True):
        bins[min(BINS - 1, int(value * BINS))].append((value, is_right))
    return [Bin(len(one), sum(v for v, _ in one) / len(one), sum(r for _, r in one) / len(one)) for one in bins if one]


def expected_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of confidence and accuracy, by the size of bins."""
    return sum(b.boxes * abs(b.confidence - b.accuracy) for b in reliability(confidence, right)) / max(1, len(right))


def ranking(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a right box scores higher than a wrong one; ties count half. NaN without."""
    values, is_right = np.array(scores, float), np.array(right, bool)
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):
        same = values == value
        ranks[same] = ranks[same].mean()
    positives, negatives = int(is_right.sum()), int((~is_right).sum())
    if not positives or not negatives:
        return float("nan")
    return float((ranks[is_right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Sequence[float], right: Sequence[bool], total: int) -> float:
    """Area under precision and recall, every point counted; total: right boxes that there are to find."""
    order = np.argsort(-np.array(scores, float), kind="stable")
    hits = np.array(right, float)[order]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or more
    return float((best * hits).sum() / max(1, total))


def risk_coverage(scores: Sequence[float], right: Sequence[bool]) -> tuple[Floats, Floats]:
    """Coverage and risk: of the share of boxes with the highest scores, the share that is wrong."""
    order = np.argsort(-np.array(scores, float), kind="stable")
    wrong = 1 - np.array(right, float)[order]
    counts = np.arange(1, len(wrong) + 1)
    return counts / len(wrong), wrong.cumsum() / counts


def plot_reliability(confidence: Sequence[float], right: Sequence[bool], path: str, title: str) -> None:
    """Draw confidence against accuracy, and how many boxes each point stands for. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bins = reliability(confidence, right)
    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(5, 5.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    upper.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1)
    upper.plot([b.confidence for b in bins], [b.accuracy for b in bins], "o-", color="#2166ac")
    upper.set(ylabel="share that is right", title=title, ylim=(-0.02, 1.02))
    lower.bar([b.confidence for b in bins], [b.boxes for b in bins], width=0.05, color="#92c5de")
    lower.set(xlabel="confidence", ylabel="boxes", xlim=(-0.02, 1.02))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
