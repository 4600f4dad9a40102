"""VQA accuracy with its normalization (Antol et al. 2015, https://arxiv.org/abs/1505.00468; the VQA evaluation tool).

An answer that at least three of the other nine people gave is right; the score is the mean over who is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qvl_runtime.evaluate.metrics.vqa_words import ARTICLES, CONTRACTIONS, DIGITS

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")  # the tool's own: the look-behind is misspelled and always holds
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOPS = 32  # the tool passes re.UNICODE, which is 32, where the number of replacements belongs


def vqa_score(answer: str, records: Sequence[Mapping[str, Any]]) -> float:
    """Score an answer against ten records of people's answers, 0 to 1.

    records: each has "answer" and, in the published files, an "answer_id". "The other nine" are those records that are
    not equal to the one left out; with ids, equal answers of others count. Where all ten are the same text, none of the
    punctuation in it is removed, and the answer must be that text after its own normalization.
    """
    given = normalized_answer(answer)
    texts = [str(record["answer"]) for record in records]
    if len(set(texts)) > 1:
        texts = [without_punctuation(text) for text in texts]
    people = [(text, {**record, "answer": text}) for text, record in zip(texts, records, strict=True)]
    shares = []
    for _, left_out in people:
        matching = sum(text == given for text, record in people if record != left_out)
        shares.append(min(1.0, matching / 3))
    return sum(shares) / len(shares)


def normalized_answer(answer: str) -> str:
    """An answer without punctuation and articles, with digits for number words and apostrophes in contractions."""
    return _words(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def without_punctuation(text: str) -> str:
    """Remove punctuation marks that touch a blank, or all of them where a comma is between digits; else leave blanks.

    Full stops are removed unless a digit follows, at most 32 of them.
    """
    out, joined = text, _DIGIT_COMMA.search(text) is not None
    for mark in _MARKS:
        blank = "" if joined or f"{mark} " in text or f" {mark}" in text else " "
        out = out.replace(mark, blank)
    return _FULL_STOP.sub("", out, count=_FULL_STOPS)


def _words(text: str) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
