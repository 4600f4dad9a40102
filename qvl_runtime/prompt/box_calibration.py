"""Turn the scores of a box into the probability that it is right: a logistic regression, fitted for one checkpoint.

`box_calibration.json` in a checkpoint's folder holds the weights and how well they did on boxes that were held out.
`qvl calibrate` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.prompt.box_scores import Probabilities, box_scores
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.boxes import BoxScores
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.regular_files import is_there, read_regular
from qvl_runtime.reading.text import decode

FILE = "box_calibration.json"
FEATURES = ("log_normalized", "log_presence", "log_spread")
_LEAST = 1e-6  # of a probability: below, its logarithm says no more


@dataclass(frozen=True, slots=True)
class BoxCalibration:
    """The probability that a box overlaps the right one by an IoU of at least `iou`."""

    weights: tuple[float, ...]  # of `FEATURES`
    bias: float
    iou: float = 0.5
    boxes: int = 0  # that it was fitted on
    held_out: int = 0  # boxes that the next two are from
    ece: float | None = None  # expected calibration error
    auroc: float | None = None  # of right against wrong boxes
    question: str | None = None  # what was asked, with {} for the phrase; None: the bare form of `locate`

    def confidence(self, scores: BoxScores) -> float:
        """The probability that a box with these scores is right."""
        z = self.bias + math.fsum(w * f for w, f in zip(self.weights, features(scores), strict=True))
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {"features": list(FEATURES)} | asdict(self)

    @classmethod
    def from_folder(cls, folder: Path) -> BoxCalibration | None:
        """Read the file of a checkpoint; None without one. Raises `CheckpointError` for one that cannot be used."""
        path = Path(folder) / FILE
        return cls.from_file(path) if is_there(path) else None

    @classmethod
    def from_file(cls, path: Path) -> BoxCalibration:
        """Read a file. Raises `CheckpointError` for one that is missing or cannot be used."""
        try:
            text = decode(read_regular(path, CheckpointError, 1 << 16), str(path), CheckpointError)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; expected what `qvl calibrate` writes") from None
        raw = parse_json(text, str(path), CheckpointError, finite=True)
        if not isinstance(raw, dict) or raw.get("features") != list(FEATURES):
            raise CheckpointError(f"{path} is no calibration of boxes; expected the features {', '.join(FEATURES)}")
        weights, bias = raw.get("weights"), raw.get("bias")
        if not isinstance(weights, list) or not all(type(value) in (int, float) for value in (*weights, bias)):
            raise CheckpointError(f"{path} has the weights {quoted(weights)} and bias {quoted(bias)}; expected numbers")
        if len(weights) != len(FEATURES):
            raise CheckpointError(f"{path} has {len(weights)} weights; expected {len(FEATURES)}")
        known = {key: raw[key] for key in ("iou", "boxes", "held_out", "ece", "auroc", "question") if key in raw}
        return cls(weights=tuple(map(float, weights)), bias=float(raw["bias"]), **known)


def features(scores: BoxScores) -> tuple[float, float, float]:
    """What the regression looks at: log normalized score, log presence, log of one and the mean spread."""
    spread = math.fsum(scores.spread) / len(scores.spread)
    return math.log(max(scores.normalized, _LEAST)), math.log(max(scores.presence, _LEAST)), math.log1p(spread)


@dataclass(frozen=True, slots=True)
class BoxJudge:
    """Scores boxes by the probabilities of their tokens, with the confidence of a calibration if there is one."""

    spelling: BoxSpelling
    calibration: BoxCalibration | None = None

    def judge(
        self, ids: Sequence[int], logprobs: Sequence[float], probabilities: Sequence[Probabilities | None]
    ) -> BoxScores | None:
        """Score a box as `box_scores` does."""
        scores = box_scores(self.spelling, ids, logprobs, probabilities)
        if scores is None or self.calibration is None:
            return scores
        return replace(scores, confidence=self.calibration.confidence(scores))
