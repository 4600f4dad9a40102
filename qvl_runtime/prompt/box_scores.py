"""What the probabilities of a box's tokens say about it: how sure the model is of it, and how precisely.

Every number is of the model's own distribution, before masks and penalties. `normalized` and what follows from it is
under the grammar: each token's probability among those that may come next in a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.box_spelling import BoxSpelling, interval, next_digits
from qvl_runtime.prompt.boxes import BoxScores

ONE_BOX = BoxRules(labels="none", least=0, most=1)
Probabilities = Mapping[int, float]  # log probability by token, of the spelling's alphabet


class Step(NamedTuple):
    """A place in a number: the digits that may stand there with their shares, that of the end, and what was written."""

    shares: dict[int, float]
    end: float
    written: int | None  # None: the end


def box_scores(
    spelling: BoxSpelling, ids: Sequence[int], logprobs: Sequence[float], probabilities: Sequence[Probabilities | None]
) -> BoxScores | None:
    """Score a box by its token ids, from the start tag to the end tag; None for one that the grammar would not write.

    logprobs: of each token; probabilities: at each position after the start tag, those of the alphabet.
    """
    shape = spelling.shapes.get(ids[0]) if ids else None
    if shape is None:
        return None
    values, moments, logs = list[int](), list[tuple[float, float]](), list[float]()
    at = 1 + len(shape.pieces[0])
    if tuple(ids[1:at]) != shape.pieces[0]:
        return None
    for number, piece in enumerate(shape.pieces[1:]):
        bounds = interval(number, values, len(shape.pieces) - 1)
        steps = _steps(spelling, piece[0], ids[at:], probabilities[at:], bounds, logs)
        if steps is None:
            return None
        at += len(steps) - 1
        if tuple(ids[at : at + len(piece)]) != piece:
            return None
        at += len(piece)
        written = [step.written for step in steps if step.written is not None]
        values.append(int("".join(map(str, written))))
        moments.append(number_moments(steps, bounds))
    if at != len(ids):
        return None
    total = math.fsum(logs)
    return BoxScores(
        presence=math.exp(logprobs[0]),
        normalized=math.exp(total / len(logs)),
        logprob=total,
        expectation=tuple(mean for mean, _ in moments),
        spread=tuple(deviation for _, deviation in moments),
    )


def _steps(
    spelling: BoxSpelling,
    end: int,
    ids: Sequence[int],
    probabilities: Sequence[Probabilities | None],
    bounds: tuple[int, int],
    logs: list[float],
) -> list[Step] | None:
    """Read a number up to the token that ends it, and add the logarithms of what had an alternative to `logs`."""
    steps, value = list[Step](), 0
    for token, given in zip(ids, probabilities, strict=True):
        digits, may_end = next_digits(value, bool(steps), *bounds)
        written = spelling.digit_of.get(token)
        if (token != end or not may_end) if written is None else written not in digits:
            return None
        shares, share_of_end = dict.fromkeys(digits, 1.0), float(may_end)
        if len(digits) + may_end > 1:
            if given is None:
                return None
            found = [given[spelling.digits[digit]] for digit in digits]
            found += [given[end]] if may_end else []
            top = max(found)
            weights = [math.exp(each - top) for each in found]
            total = math.fsum(weights)
            shares = {digit: weight / total for digit, weight in zip(digits, weights, strict=False)}
            share_of_end = weights[-1] / total if may_end else 0.0
            logs.append(math.log(max(share_of_end if written is None else shares[written], 1e-300)))
        steps.append(Step(shares, share_of_end, written))
        if written is None:
            return steps
        value = 10 * value + written
    return None


def number_moments(steps: Sequence[Step], bounds: tuple[int, int]) -> tuple[float, float]:
    """Expectation and standard deviation of a number, by what could have been written at each place.

    Of a digit that was not written, the following ones are unknown: any, in a number as long as the written one.
    """
    value, path, rest = 0, 1.0, len(steps) - 2
    mean = square = 0.0
    for digits, end, written in steps:
        size = 10 ** max(0, rest)
        for digit, share in digits.items():
            if digit == written or share < 1e-12:
                continue
            first = (10 * value + digit) * size
            low, high = max(first, bounds[0]), min(first + size - 1, bounds[1])
            middle, weight = (low + high) / 2, path * share
            mean += weight * middle
            square += weight * (middle * middle + ((high - low + 1) ** 2 - 1) / 12)
        if written is None:
            path *= end
            break
        mean += path * end * value
        square += path * end * value * value
        path *= digits[written]
        value, rest = 10 * value + written, rest - 1
    mean += path * value
    square += path * value * value
    return mean, math.sqrt(max(0.0, square - mean * mean))
