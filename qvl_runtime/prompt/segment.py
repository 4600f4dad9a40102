"""A piece of a prompt: token ids, and the positions of images among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qvl_runtime.prompt.images import ImageSource


class ImageSlot(NamedTuple):
    """The position of an image that is not read yet, so that a turn dropped from the window costs no download."""

    start: int  # index of the first pad id, counted from the start of the segment
    source: ImageSource


@dataclass(slots=True)
class Segment:
    """Token ids with their image slots, built piece by piece; `extend` shifts the slots of what it appends."""

    ids: list[int] = field(default_factory=list)
    slots: list[ImageSlot] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, *pieces: Segment | Iterable[int]) -> Segment:
        """Append other segments or bare ids in order; returns self."""
        for piece in pieces:
            if isinstance(piece, Segment):
                base = len(self.ids)
                self.slots.extend(ImageSlot(base + slot.start, slot.source) for slot in piece.slots)
                self.ids.extend(piece.ids)
            else:
                self.ids.extend(piece)
        return self
