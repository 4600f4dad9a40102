"""What the probabilities of a box's tokens say about it: how sure the model is of it, and how precisely.

Every number is of the model's own distribution, before masks and penalties. `normalized` and what follows from it is
under the grammar: each token's probability among those that may come next in a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qvl_runtime.prompt.box_grammar import BoxGrammar
from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.box_spelling import BoxSpelling, Ids
from qvl_runtime.prompt.boxes import BoxScores

ONE_BOX = BoxRules(labels="none", least=0, most=1)
Probabilities = Mapping[int, float]  # log probability by token, of the spelling's alphabet


def box_scores(
    spelling: BoxSpelling, ids: Sequence[int], logprobs: Sequence[float], probabilities: Sequence[Probabilities | None]
) -> BoxScores | None:
    """Score a box by its token ids, from the start tag to the end tag; None for one that the grammar would not write.

    logprobs: of each token; probabilities: at each position after the start tag, those of the alphabet.
    """
    if not ids or ids[0] not in spelling.shapes:
        return None
    vocab = max(spelling.tokenizer.n_vocab, *ids) + 1
    grammar = BoxGrammar(spelling, ONE_BOX, vocab, (), len(ids) + spelling.quad.longest)
    if not grammar.advance(ids[0]):
        return None
    chosen = list[float]()
    numbers = [Number()]
    for token, at in zip(ids[1:], probabilities[1:], strict=True):
        legal = grammar.shape_tokens()
        low_high = grammar.interval()
        if not grammar.advance(token) or (len(legal) > 1 and at is None):
            return None
        if low_high is None:  # a piece between numbers
            continue
        shares = _shares(legal, at or {}) if len(legal) > 1 else {legal[0]: 1.0}
        if len(legal) > 1:
            chosen.append(math.log(max(shares[token], 1e-300)))
        number = numbers[-1]
        digits = {spelling.digit_of[t]: share for t, share in shares.items() if t in spelling.digit_of}
        number.steps.append((digits, 1.0 - math.fsum(digits.values())))
        number.bounds = low_high
        if token in spelling.digit_of:
            number.written.append(spelling.digit_of[token])
        else:
            numbers.append(Number())
    if not grammar.done or not chosen:
        return None
    moments = [number.moments() for number in numbers if number.written]
    total = math.fsum(chosen)
    return BoxScores(
        presence=math.exp(logprobs[0]),
        normalized=math.exp(total / len(chosen)),
        logprob=total,
        expectation=tuple(mean for mean, _ in moments),
        spread=tuple(deviation for _, deviation in moments),
    )


class Number:
    """One coordinate as it was written: its digits, and at each place the shares of other digits and of its end."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.steps: list[tuple[dict[int, float], float]] = []
        self.bounds = (0, 0)

    def moments(self) -> tuple[float, float]:
        """Expectation and standard deviation.

        Of a digit that was not written, the following ones are unknown: any, in a number as long as the written one.
        """
        value, path = 0, 1.0
        weights, means, variances = list[float](), list[float](), list[float]()
        for place, (digits, end) in enumerate(self.steps):
            written = self.written[place] if place < len(self.written) else None
            rest = max(0, len(self.written) - 1 - place)
            for digit, share in digits.items():
                if digit == written:
                    continue
                first = (10 * value + digit) * 10**rest
                low, high = max(first, self.bounds[0]), min(first + 10**rest - 1, self.bounds[1])
                low, high = min(low, high), max(low, high)
                weights.append(path * share)
                means.append((low + high) / 2)
                variances.append(((high - low + 1) ** 2 - 1) / 12)
            if written is not None:
                weights.append(path * end)
                means.append(value)
                variances.append(0.0)
                path *= digits.get(written, 0.0)
                value = 10 * value + written
            else:
                path *= end
        weights.append(path)
        means.append(value)
        variances.append(0.0)
        total = math.fsum(weights) or 1.0
        mean = math.fsum(w * m for w, m in zip(weights, means, strict=True)) / total
        square = math.fsum(w * (m - mean) ** 2 + w * v for w, m, v in zip(weights, means, variances, strict=True))
        return mean, math.sqrt(max(0.0, square / total))


def _shares(legal: Ids, at: Probabilities) -> dict[int, float]:
    """Probabilities of the legal tokens, which add up to 1."""
    values = {token: at[token] for token in legal}
    top = max(values.values())
    weights = {token: math.exp(value - top) for token, value in values.items()}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}
