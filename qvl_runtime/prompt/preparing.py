"""From the bytes of an image file to what the model sees: pure functions, which a worker process runs as well."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from qvl_runtime.prompt.decoding import Remark, decode
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    from PIL import Image

Admit: TypeAlias = Callable[[int, int], None]
"""Called with width and height before pixels are decoded; raises to prevent that."""

PREVIEW_SIDE = 2048  # pixels, the longer side
_PREVIEW_QUALITY = 90


class Prepared(NamedTuple):
    """An image as the model sees it, and what is said and drawn of it later."""

    rgb: bytes | bytearray | memoryview  # uint8 [S, S, 3]
    width: int  # pixels of the original
    height: int
    remarks: frozenset[Remark]
    preview: bytes | None  # JPEG of at most `PREVIEW_SIDE` pixels a side, if it was asked for


def prepare(
    data: bytes, size: int, limits: ImageLimits, described: str, admit: Admit, with_preview: bool = False
) -> Prepared:
    """Decode the bytes of an image file and resize it to size x size. Raises `ImageError`, and what `admit` raises."""
    image, remarks = decode(data, limits, described, admit)
    small = preview(image) if with_preview else None
    return Prepared(resize(image, size), image.width, image.height, remarks, small)


def resize(image: Image.Image, size: int) -> bytes:
    """uint8 [size, size, 3]; PIL's cubic kernel a = -0.5, antialiased, in 8-bit fixed point."""
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BICUBIC).tobytes()


def preview(image: Image.Image) -> bytes:
    """A small copy of an RGB image to draw on, as JPEG."""
    from PIL import Image

    scale = min(1.0, PREVIEW_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0).save(file, "JPEG", quality=_PREVIEW_QUALITY)
    return file.getvalue()
