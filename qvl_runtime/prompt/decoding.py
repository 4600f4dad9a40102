"""Decode an image to RGB at its original size: pure functions of bytes (or an image, or an array) and limits.

They need no torch, so that a worker process can run them.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from qvl_runtime.errors import ImageError, QVLError
from qvl_runtime.prompt.deep_pixels import MODES as DEEP_MODES
from qvl_runtime.prompt.deep_pixels import check_range, narrow_array, narrow_image
from qvl_runtime.prompt.file_kinds import HEAD, refusal
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.transparency import alpha_hides, on_white

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# The formats that PIL decodes itself. It supports more, but for EPS, say, it would run Ghostscript on untrusted input.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

Remark: TypeAlias = Literal["transparency", "exif_orientation"]
"""The option whose default left out something that the image holds."""

_ORIENTATION = 0x0112  # EXIF tag; PIL's transpositions that undo 2 to 8
_TURNS = dict(
    zip(
        range(2, 9),
        ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
        strict=True,
    )
)
_DEEP_COLOR = re.compile(r"\b(?:RGB[AaX]?|LA|CMYK);16[BLN]")  # PIL's raw modes that it reduces to 8 bits
_LOADING = threading.Lock()  # PIL loads an image lazily, and not safely when two threads share it


class Decoded(NamedTuple):
    """An image in RGB, and what reading it left out."""

    image: Image.Image
    remarks: frozenset[Remark] = frozenset()


def readable_formats() -> tuple[str, ...]:
    """`FORMATS`, and AVIF where this Pillow can read it."""
    from PIL import features

    avif = "avif" in features.modules and features.check_module("avif")
    return (*FORMATS, "AVIF") if avif else FORMATS


def decode(
    data: bytes, limits: ImageLimits, described: str, admit: Callable[[int, int], None] | None = None
) -> Decoded:
    """Decode the bytes of an image file; `described` names it. Raises `ImageError`, which repeats none of the bytes.

    `admit` is called with width and height before pixels are decoded, and may raise a `QVLError` to prevent that.
    """
    from PIL import Image, UnidentifiedImageError

    formats = readable_formats()
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:  # reads the header only
            _refuse_thumbnails(image, described)
            limits.check_pixels(image.width, image.height, described)
            if admit is not None:
                admit(image.width, image.height)
            return _to_rgb(image, limits, described, copied=False)
    except QVLError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{described} {refusal(data[:HEAD], formats)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL's own guard, at 179 million pixels, raises before the size can be read; its message has the count.
        count = re.search(r"\d+", str(error))
        pixels = f" with {int(count[0]):,}" if count else ""
        raise ImageError(
            f"{described} is over the limit of {limits.max_image_pixels:,} pixels{pixels}: shrink it"
        ) from error
    except MemoryError as error:
        raise ImageError(f"{described} needs more memory than there is to be decoded: shrink it") from error
    except Exception as error:  # of PIL's decoders, which trust the numbers in the file
        raise ImageError(f"{described} is damaged: {_cause(error)}; send the image again") from error


def convert(image: Image.Image, limits: ImageLimits, described: str) -> Decoded:
    """Convert a PIL image of the caller, which is loaded here if it was opened lazily. Raises `ImageError`."""
    limits.check_pixels(image.width, image.height, described)
    deep_color = _is_deep_color(image)
    try:
        with _LOADING:
            image.load()
        return _to_rgb(image, limits, described, deep_color)
    except QVLError:
        raise
    except MemoryError as error:
        raise ImageError(f"{described} needs more memory than there is to be decoded: shrink it") from error
    except Exception as error:  # of any plugin: closed and removed files show as a dozen types
        raise ImageError(f"{described} {_why_not_loaded(image, error)}") from error


def convert_array(array: np.ndarray[Any, Any], limits: ImageLimits, described: str) -> Decoded:
    """Convert an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16, bool or floats from 0 to 1.

    Raises `ImageError`.
    """
    import numpy as np
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = ": its channels come first, pass array.transpose(1, 2, 0)" if first else ""
        raise ImageError(f"{described} has the wrong shape; expected [height, width] or [height, width, 3 or 4]{hint}")
    limits.check_pixels(array.shape[1], array.shape[0], described)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(narrow_array(array, limits, described))), limits, described)


def _to_rgb(
    image: Image.Image, limits: ImageLimits, described: str, deep_color: bool | None = None, copied: bool = True
) -> Decoded:
    """The image in RGB, turned and put on white as the options say; PIL decodes the file here.

    With `copied`, it shares nothing with the image; a copy of 64 million pixels takes 0.3 s and 256 MiB.
    """
    from PIL import Image

    deep_color = _is_deep_color(image) if deep_color is None else deep_color  # told only before decoding
    image.load()
    remarks: set[Remark] = set()
    if image.mode in DEEP_MODES:
        rgb = narrow_image(image, limits, described).convert("RGB")
    elif not image.has_transparency_data:
        rgb = image if image.mode == "RGB" and not copied else _opaque_to_rgb(image, described)
    elif limits.transparency == "white":
        rgb = on_white(image)
    else:
        rgb = (image.convert("LA") if image.mode == "La" else image).convert("RGB")
        if alpha_hides(image):
            remarks.add("transparency")
    if deep_color and image.mode not in DEEP_MODES:
        rgb = _check_deep_color(rgb, limits, described)
    if turn := _TURNS.get(_orientation(image)):
        if limits.exif_orientation == "apply":
            rgb = rgb.transpose(Image.Transpose[turn])
        else:
            remarks.add("exif_orientation")
    return Decoded(rgb, frozenset(remarks))


def _opaque_to_rgb(image: Image.Image, described: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise ImageError(f"{described} has colors in {image.mode}, which this Pillow cannot convert to RGB") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8 if the image has one. PIL itself turns a TIFF file, and removes the tag."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata: the pixels are whole, and viewers show them unturned, too
        return 1


def _is_deep_color(image: Image.Image) -> bool:
    """Whether PIL will reduce colors of 16 bits to 8; known only before it has."""
    tiles: Any = getattr(image, "tile", ())
    return any(_DEEP_COLOR.search(str(tile[3])) or _is_deep_ppm(tile) for tile in tiles if len(tile) > 3)


def _is_deep_ppm(tile: Any) -> bool:
    return tile[0] == "ppm" and any(int(number) > 255 for number in re.findall(r"\d+", str(tile[3])))


def _check_deep_color(rgb: Image.Image, limits: ImageLimits, described: str) -> Image.Image:
    """Refuse, or stretch, colors that were 16 bits and use less than a quarter of the range."""
    bands = [band for band in rgb.getextrema() if isinstance(band, tuple)]
    low, high = min(band[0] for band in bands), max(band[1] for band in bands)
    stretch = limits.deep_pixels == "stretch"
    check_range(low, high, 255, "16-bit color, its high bytes", stretch, described)
    if not stretch or low == high:
        return rgb
    return rgb.point([round(min(max(level - low, 0) / (high - low), 1) * 255) for level in range(256)] * 3)


def _refuse_thumbnails(image: Image.Image, described: str) -> None:
    """Refuse a TIFF file whose first picture is a small stand-in for raw sensor data, as in DNG, NEF and ARW."""
    tags: Any = getattr(image, "tag_v2", {})
    if 50706 in tags or (330 in tags and int(tags.get(254) or 0) & 1):  # DNGVersion; SubIFDs, NewSubfileType reduced
        raise ImageError(f"{described} is camera raw, which is not read: develop it to JPEG or PNG")


def _why_not_loaded(image: Image.Image, error: Exception) -> str:
    file = getattr(image, "fp", None)
    if isinstance(error, FileNotFoundError):
        return "was opened from a file that is gone: call image.load() while it is there, or pass bytes"
    if file is None or getattr(file, "closed", False) or "closed" in str(error):
        return "was closed before it was decoded: call image.load() while its file is open, or pass the path"
    return f"is damaged: {_cause(error)}; send the image again"


def _cause(error: Exception) -> str:
    """What PIL says, without what some of its messages quote from the file, after a colon or in quotation marks."""
    text = re.split(r":|\bb?['\"]", str(error))[0]
    return text.rstrip(" (") or type(error).__name__
