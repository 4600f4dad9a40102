"""Load images from any source as S x S RGB, the model's input, identified by their SHA-256.

The steps are the original's, to the byte: open without EXIF rotation, `convert("RGB")` (alpha dropped, not
composited), PIL's bicubic resize to a square whatever the aspect ratio. Source: docs/model.md section 3.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.fetch import check_size, read_bytes, short_name
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]"
"""A path, an http(s) or data URL, the bytes of an image file, a PIL image, or uint8 [H, W], [H, W, 3] or [H, W, 4]."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# The formats that PIL decodes itself. It supports more, but for EPS, say, it would run Ghostscript on untrusted input.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Exceptions of PIL's decoders for damaged files.
_BUGS = (TypeError, LookupError, ArithmeticError)  # from plugins that trust the numbers in the file
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, *_BUGS)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """An image as the model sees it, and the original to draw on."""

    source: str  # for messages: a path, a URL, "12,345 bytes"
    rgb: np.ndarray[Any, Any]  # uint8 [S, S, 3], read-only
    digest: bytes  # SHA-256 of S and the bytes of `rgb`: the image's identity
    original: Image.Image  # RGB, width x height
    width: int  # pixels
    height: int  # pixels


def load_image(
    source: ImageSource, size: int, limits: ImageLimits | None = None, name: str | None = None
) -> LoadedImage:
    """Read an image and resize it to size x size.

    `name` ("image 2") precedes the source in error messages. Raises `ImageError` for an image that cannot be read or
    exceeds a limit, and `DownloadError` for a URL that cannot or may not be fetched.
    """
    described = describe(source)
    original = _open(source, limits or ImageLimits(), f"{name} ({described})" if name else described)
    rgb = _resize(original, size)
    digest = hashlib.sha256(size.to_bytes(4, "little") + rgb.tobytes()).digest()
    return LoadedImage(described, rgb, digest, original, original.width, original.height)


def to_pixels(rgb: np.ndarray[Any, Any]) -> torch.Tensor:
    """The vision encoder's input: uint8 [N, S, S, 3] to float32 [N, 3, S, S], scaled to 0..1 and normalized."""
    import torch

    scaled = torch.tensor(rgb).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
    mean, std = (torch.tensor(channels).view(1, 3, 1, 1) for channels in (MEAN, STD))
    return (scaled - mean) / std


def describe(source: ImageSource) -> str:
    """A short name for an image, on one line, for messages."""
    if isinstance(source, (str, os.PathLike)):
        return short_name(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source):,} bytes"
    type_name, shape = type(source).__name__, getattr(source, "shape", None) or getattr(source, "size", None)
    return f"{type_name} {' x '.join(map(str, shape))}" if isinstance(shape, tuple) else type_name


def _open(source: ImageSource, limits: ImageLimits, described: str) -> Image.Image:
    """The image in RGB at its original size."""
    import numpy as np
    from PIL import Image

    if isinstance(source, np.ndarray):
        source = _from_array(source, described)
    if isinstance(source, Image.Image):
        _check_pixels(source, limits, described)
        return _to_rgb(source, described)
    if isinstance(source, (str, os.PathLike)):
        return _decode(read_bytes(source, limits, described), limits, described)
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_size(len(source), limits, described)
        return _decode(bytes(source), limits, described)
    raise ImageError(f"{described} is not an image; expected a path, URL, bytes, PIL image or numpy array")


def _decode(data: bytes, limits: ImageLimits, described: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise ImageError(f"{described} starts with {data[:8]!r}, which is not an image; expected {formats}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL's own guard, at 179 million pixels, raises before the size can be read; its message has the count.
        count = re.search(r"\d+", str(error))
        pixels = f" with {int(count[0]):,}" if count else ""
        raise ImageError(
            f"{described} is over the limit of {limits.max_image_pixels:,} pixels{pixels}: shrink it"
        ) from error
    except _DAMAGE as error:
        raise ImageError(f"{described} is damaged: {error}; send the image again") from error
    with image:
        _check_pixels(image, limits, described)
        return _to_rgb(image, described)


def _to_rgb(image: Image.Image, described: str) -> Image.Image:
    """An independent copy in RGB; PIL decodes the file here."""
    from PIL import Image

    try:
        return image.convert("RGB")
    except (Image.DecompressionBombError, *_DAMAGE) as error:
        raise ImageError(f"{described} is damaged: {error}; send the image again") from error


def _from_array(array: np.ndarray[Any, Any], described: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if array.dtype != np.uint8:
        raise ImageError(f"{described} holds {array.dtype}; expected uint8 from 0 to 255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise ImageError(f"{described} has the wrong shape; expected [height, width] or [height, width, 3 or 4]")
    return Image.fromarray(np.ascontiguousarray(array))


def _check_pixels(image: Image.Image, limits: ImageLimits, described: str) -> None:
    width, height = image.size
    if width * height > limits.max_image_pixels:
        raise ImageError(
            f"{described} is {width} x {height}, over the limit of {limits.max_image_pixels:,} pixels: "
            "shrink it or raise max_image_pixels"
        )
    if width * height == 0:
        raise ImageError(f"{described} is {width} x {height}: it has no pixels")


def _resize(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """uint8 [size, size, 3], read-only; PIL's cubic kernel a = -0.5, antialiased, in 8-bit fixed point."""
    import numpy as np
    from PIL import Image

    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    # A request keeps its images until it finishes. On the heap they would sit between the activations of steps and
    # leave holes that no later step fits.
    pixels = np.frombuffer(mmap.mmap(-1, 3 * size * size), dtype=np.uint8)
    pixels[:] = np.frombuffer(resized.tobytes(), dtype=np.uint8)
    pixels.flags.writeable = False
    return pixels.reshape(size, size, 3)
