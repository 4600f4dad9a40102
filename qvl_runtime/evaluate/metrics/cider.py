"""CIDEr-D of the COCO caption tool (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, section 4).

The weight of an n-gram is its count times the logarithm of images over images whose references hold it, so a score
depends on all images of the run: a part of a data set has other weights, and its number compares with nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from qvl_runtime.evaluate.metrics.ptb import ptb_tokens

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the Gaussian penalty on the difference of lengths
NGram = tuple[str, ...]


class Vector(NamedTuple):
    """A caption as weights of its n-grams, one mapping for each n."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    length: int  # the tool counts bigrams, not words: a caption of one word has none


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score one caption for each image against its references; the mean over images is CIDEr-D, 0 to 10.

    candidates: one for each image; references: any number of at least one for each. Both are tokenized here.
    """
    cooked = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in cooked for ngram in set().union(*texts))
    log_images = math.log(len(cooked)) if cooked else 0.0
    scores = []
    for candidate, texts in zip(candidates, cooked, strict=True):
        one = _vector(_ngrams(candidate), frequency, log_images)
        total = sum(_similarity(one, _vector(text, frequency, log_images)) for text in texts)
        scores.append(10.0 * total / LONGEST / len(texts))
    return scores


def _ngrams(text: str) -> Counter[NGram]:
    words = ptb_tokens(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _vector(counts: Counter[NGram], frequency: Counter[NGram], log_images: float) -> Vector:
    weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequency[ngram])))
    norms = [math.sqrt(sum(weight * weight for weight in part.values())) for part in weights]
    return Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(one: Vector, other: Vector) -> float:
    """Clipped cosine of the two, summed over n, with the penalty on lengths."""
    penalty = math.exp(-((one.length - other.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for mine, theirs, my_norm, their_norm in zip(one.weights, other.weights, one.norms, other.norms, strict=True):
        common = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs)
        # The tool leaves the sum as it is where a norm is zero; then all weights of one side are, and so is the sum.
        if my_norm and their_norm:
            total += common / (my_norm * their_norm) * penalty
    return total
