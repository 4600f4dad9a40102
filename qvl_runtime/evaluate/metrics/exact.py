"""Answers that are right when they are the expected words: AI2D and OCR-VQA as they are, GQA and MME cut first."""

from __future__ import annotations

from collections.abc import Sequence

# GQA keeps what follows the first of these and, at the end, what precedes " of". They are searched as plain substrings,
# so that "pizza is" is cut at "a " of its "pizza ", too; the published numbers were made that way.
_LEADS = ("is ", "are ", "a ", "an ", "the ")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references but for case and outer blanks, else 0."""
    plain = answer.strip().lower()
    return float(any(plain == reference.strip().lower() for reference in references))


def gqa_answer(answer: str) -> str:
    """The part of an answer that is compared with GQA's: "It is a dog. Yes" is "dog"."""
    text = answer.strip()
    for mark in ".,!":
        text = text.split(mark)[0]
    text = text.lower()
    for lead in _LEADS:
        if lead in text:
            text = text.split(lead)[1]
    return text.split(" of")[0].strip()


def mme_answer(answer: str) -> str:
    """ "yes", "no", or "other", which is wrong: the whole answer, or what its first four characters hold."""
    text = answer.lower()
    if text in ("yes", "no"):
        return text
    beginning = text[:4]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"
