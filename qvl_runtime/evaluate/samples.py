"""A question of a data set, in one form for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

LETTERS = "ABCDE"  # of the options of a multiple choice
Reference: TypeAlias = Any  # a text, an answer's record, corners of a box, the number of an option


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or more images, and what is right."""

    id: str | int  # as its file has it
    images: tuple[str, ...]  # paths, or data URLs of images that the file holds itself
    question: str = ""
    options: tuple[str, ...] = ()  # of a multiple choice, without their letters
    hint: str = ""
    references: tuple[Reference, ...] = ()  # in the form of the metric; empty where the split keeps them secret
    part: str = ""  # of the data set: a subtask, a half, a dimension
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else a metric or a submission needs

    @property
    def picture(self) -> str:
        """A short name of its images: questions with the same name are about the same images."""
        return "|".join(
            image if len(image) < 300 else hashlib.sha256(image.encode()).hexdigest()[:16] for image in self.images
        )
