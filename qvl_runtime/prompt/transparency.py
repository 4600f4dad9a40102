"""Images with an alpha channel: put them on white, or find out whether dropping the channel loses anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_STRIP = 2**20  # pixels that are composited at a time: PIL holds 4 bytes for each, and an image may have millions
_VISIBLE = 32  # levels out of 255 by which a channel must differ from what a viewer shows on white


def on_white(image: Image.Image) -> Image.Image:
    """A copy in RGB, composited on white."""
    from PIL import Image

    canvas = Image.new("RGB", image.size, "white")
    for top, strip in _strips(image):
        canvas.paste(strip, (0, top), strip)
    return canvas


def alpha_hides(image: Image.Image) -> bool:
    """Whether pixels that are transparent have a color that differs from white, which dropping alpha would show."""
    from PIL import Image, ImageChops

    for _, strip in _strips(image):
        low, _ = strip.getchannel("A").getextrema()
        if low == 255:
            continue
        shown = Image.new("RGB", strip.size, "white")
        shown.paste(strip, (0, 0), strip)
        extremes = ImageChops.difference(shown, strip.convert("RGB")).getextrema()
        if any(isinstance(band, tuple) and band[1] >= _VISIBLE for band in extremes):
            return True
    return False


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Full-width strips in RGBA, each with its top row."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
