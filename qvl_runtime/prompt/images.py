"""Load images from any source as S x S RGB, the model's input, identified by their SHA-256.

The steps are the original's, to the byte: open without EXIF rotation, `convert("RGB")` (alpha dropped, not
composited), PIL's bicubic resize to a square whatever the aspect ratio. Options of `ImageLimits` depart from it, and
pixels of more than 8 bits do. Source: docs/model.md section 3.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.decoding import Decoded, Remark, convert, convert_array, decode
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.sources import Source, is_readable, read_bytes, short_name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

_log = logging.getLogger(__name__)

ImageSource: TypeAlias = "Source | Image.Image | np.ndarray[Any, Any] | torch.Tensor"
"""A path, an http(s), file or data URL, the bytes of an image file, bare or in base64, an open file, a PIL image, or an
array [H, W], [H, W, 3] or [H, W, 4] of uint8 or uint16, or of floats from 0 to 1.
"""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_REMARKS: dict[Remark, str] = {
    "transparency": "%s has transparent pixels, and the model sees the color under them, as in the original: set "
    "transparency to 'white' to put images on white (said once)",
    "exif_orientation": "%s is seen as it is stored, as in the original, although its EXIF orientation turns it: set "
    "exif_orientation to 'apply' to turn images, and their boxes (said once)",
}
_logged: set[Remark] = set()


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
    original, remarks = _open(source, limits or ImageLimits(), f"{name} ({described})" if name else described)
    _log_remarks(remarks, described)
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
        return f"{memoryview(source).nbytes:,} bytes"
    if callable(getattr(source, "read", None)):
        name = getattr(source, "name", None)
        return f"open file {short_name(name)}" if isinstance(name, str) else f"open {type(source).__name__}"
    type_name, shape = type(source).__name__, getattr(source, "shape", None) or getattr(source, "size", None)
    return f"{type_name} {' x '.join(map(str, shape))}" if isinstance(shape, tuple) else type_name


def _open(source: ImageSource, limits: ImageLimits, described: str) -> Decoded:
    """The image in RGB at its original size."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        return convert(source, limits, described)
    if is_readable(source):
        return decode(read_bytes(source, limits, described), limits, described)
    if not isinstance(source, np.ndarray) and hasattr(source, "__array__"):
        try:
            source = np.asarray(source)
        except Exception as error:  # of any array library, such as torch for a tensor on a GPU
            raise ImageError(f"{described} cannot be read as a numpy array: {error}") from error
    if isinstance(source, np.ndarray):
        return convert_array(source, limits, described)
    raise ImageError(
        f"{described} is not an image; expected a path, URL, bytes, open file, PIL image, numpy array or tensor"
    )


def _log_remarks(remarks: Iterable[Remark], described: str) -> None:
    """Log what the defaults left out of an image, once a process for each option: every image would repeat it."""
    for remark in remarks:
        if remark not in _logged:
            _logged.add(remark)
            _log.warning(_REMARKS[remark], described)


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
