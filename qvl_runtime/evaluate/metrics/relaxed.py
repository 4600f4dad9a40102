"""Relaxed accuracy of ChartQA (Masry et al. 2022, https://arxiv.org/abs/2203.10244, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05  # of the reference


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is within 5 % of a numeric reference or equals another one but for case, else 0.

    A percentage is divided by 100. A minus sign of typography is one, which the original's script does not read. A
    reference of 0, for which 5 % is nothing, is compared as text.
    """
    return float(any(_correct(answer.strip(), reference) for reference in references))


def _correct(answer: str, reference: str) -> bool:
    given, expected = as_number(answer), as_number(reference)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= TOLERANCE
    return answer.lower() == reference.lower()


def as_number(text: str) -> float | None:
    """The number that a text is, or None: "12%" is 0.12, and what Python reads as a float is one."""
    text = text.replace("\u2212", "-")
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
