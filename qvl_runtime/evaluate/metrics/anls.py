"""ANLS, average normalized Levenshtein similarity (Biten et al. 2019, https://arxiv.org/abs/1905.13648)."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5  # a similarity below it counts as none


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity of an answer to the reference it is nearest to, 0 or 0.5 to 1.

    Case and runs of blanks do not count in the distance. As in the evaluation script of DocVQA, which the original
    used, the distance is divided by the length of the longer text *with* its blanks.
    """
    nearest = min(_distance_share(answer, reference) for reference in references)
    return 1 - nearest if 1 - nearest >= THRESHOLD else 0.0


def _distance_share(answer: str, reference: str) -> float:
    length = max(len(answer.upper()), len(reference.upper()))  # some letters have two capitals, as in the script
    return levenshtein(_plain(answer), _plain(reference)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that make one text the other."""
    previous = list(range(len(other) + 1))
    for i, mine in enumerate(one, 1):
        row = [i]
        for j, theirs in enumerate(other, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (mine != theirs)))
        previous = row
    return previous[-1]
