"""Beam search over the digits of a box, after a prompt that ends where a box begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from qvl_runtime.engine.prefix import Prefix
from qvl_runtime.prompt.box_grammar import BoxGrammar
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.schedule.sequence import Sequence

ALIKE = 4  # beams with the same hundreds digits
UNITS = 2  # digits after which a number's next one makes no new beam: a thousandth or so of the image's side


@dataclass(slots=True, eq=False)
class Beam:
    """A box that is being written: its tokens after the start tag, and the logarithm of its probability so far."""

    sequence: Sequence
    grammar: BoxGrammar
    pending: list[int] = field(default_factory=list)  # tokens that are not computed yet
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0

    def take(self, token: int) -> None:
        """Append a token, and those that follow without a choice."""
        self.grammar.advance(token)
        forced = self.grammar.forced()
        for each in forced:
            self.grammar.advance(each)
        self.ids += [token, *forced]
        self.pending += [token, *forced]

    def fork(self, logprob: float) -> Beam:
        """Return a beam that continues what is computed."""
        return Beam(self.sequence.fork(), self.grammar.fork(), [], list(self.ids), logprob)


def likeliest_boxes(prefix: Prefix, grammar: BoxGrammar, start: int, width: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the `width` likeliest boxes that were found: token ids from the start tag on, and log probability.

    Probabilities are those of the grammar: each token's among those that may come next. With width 1, this is greedy
    decoding under the grammar. Beams that differ only in the last digit of a number are one.
    """
    live, done = [Beam(prefix.fork(), grammar)], list[Beam]()
    live[0].take(start)
    try:
        while live:
            prefix.cancellation.check()
            live, finished = _step(prefix, live, width)
            done = sorted((*done, *finished), key=lambda beam: -beam.logprob)[:width]
            if len(done) == width:  # probabilities only fall
                _close(beam for beam in live if beam.logprob <= done[-1].logprob)
                live = [beam for beam in live if beam.logprob > done[-1].logprob]
            _close(finished)
        return [(tuple(beam.ids), beam.logprob) for beam in done]
    finally:
        _close(live)


def _step(prefix: Prefix, live: list[Beam], width: int) -> tuple[list[Beam], list[Beam]]:
    """Compute what is pending of each beam, and continue the best of all: those to go on with, and complete ones."""
    computed = prefix.core.runner.compute([Chunk(beam.sequence, beam.pending) for beam in live])
    ends = [end - 1 for end in accumulate(len(beam.pending) for beam in live)]
    options: list[tuple[float, Beam, int]] = []
    for beam, row in zip(live, prefix.checked(computed(ends)), strict=True):
        legal = beam.grammar.shape_tokens()
        shares = sorted(zip(row[list(legal)].log_softmax(-1).tolist(), legal, strict=True), reverse=True)
        options += [(beam.logprob + share, beam, token) for share, token in _distinct(beam.grammar, shares)]
    continued = list[Beam]()
    try:
        for logprob, beam, token in _diverse(options, width):
            continued.append(beam.fork(logprob))
            continued[-1].take(token)
    except BaseException:
        _close(continued)
        raise
    _close(live)
    return [beam for beam in continued if not beam.grammar.done], [beam for beam in continued if beam.grammar.done]


def _diverse(options: list[tuple[float, Beam, int]], width: int) -> list[tuple[float, Beam, int]]:
    """The `width` likeliest continuations, at most `ALIKE` of those with the same hundreds digits so far.

    Without that bound, all beams end within a few thousandths of the first.
    """
    alike, chosen = Counter[tuple[int, ...]](), list[tuple[float, Beam, int]]()
    for option in sorted(options, key=lambda option: -option[0]):
        _, beam, token = option
        place = beam.grammar.place(token)
        alike[place] += 1
        if alike[place] <= ALIKE and len(chosen) < width:
            chosen.append(option)
    return chosen


def _distinct(grammar: BoxGrammar, shares: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """What a beam may be continued with, the likeliest first: of the digits after `UNITS` only the likeliest."""
    if grammar.digits < UNITS:
        return shares
    digits = [option for option in shares if option[1] in grammar.spelling.digit_of]
    return [option for option in shares if option not in digits[1:]]


def _close(beams: Iterable[Beam]) -> None:
    for beam in beams:
        beam.sequence.close()
