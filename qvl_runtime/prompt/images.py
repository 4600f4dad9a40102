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
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.decoding import Decoded, Remark, convert, convert_array, decode
from qvl_runtime.prompt.isolation.pool import shared_pool
from qvl_runtime.prompt.isolation.process import Job
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.preparing import Prepared, prepare, resize
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
    """An image as the model sees it, and what its original is drawn from."""

    source: str  # for messages: a path, a URL, "12,345 bytes"
    rgb: np.ndarray[Any, Any]  # uint8 [S, S, 3], read-only
    digest: bytes  # SHA-256 of S and the bytes of `rgb`: the image's identity
    width: int  # pixels of the original
    height: int
    stored: bytes | Image.Image  # the encoded file or a smaller copy of it, or the caller's image in RGB
    limits: ImageLimits  # as it was read

    @property
    def original(self) -> Image.Image:
        """The image in RGB, decoded at each use: the encoded file is kept, which is a tenth of it.

        The files of a prompt beyond `max_image_bytes` together are kept as copies of at most 2048 pixels a side.
        """
        return decode(self.stored, self.limits, self.source).image if isinstance(self.stored, bytes) else self.stored


class ImageReader:
    """Reads the images of one prompt, one after another, within the limits on all of them together."""

    def __init__(self, size: int, limits: ImageLimits, cancellation: Cancellation = NEVER) -> None:
        self._size, self._limits, self._cancellation = size, limits, cancellation
        self._pixels = 0  # of the images so far
        self._stored = 0  # bytes of their files that are kept

    def read(self, source: ImageSource, name: str | None = None) -> LoadedImage:
        """Read an image and resize it to size x size.

        `name` ("image 2") precedes the source in error messages. Raises `ImageError` for an image that cannot be read
        or exceeds a limit, `DownloadError` for a URL that cannot or may not be fetched, and `Canceled`.
        """
        source_name = describe(source)
        described = f"{name} ({source_name})" if name else source_name
        rgb, pixels = _empty(self._size)
        stored: bytes | Image.Image
        if is_readable(source):
            image, stored = self._decode(source, pixels, described)
        else:
            image, stored = self._convert(source, pixels, described)
        _log_remarks(image.remarks, source_name)
        rgb.flags.writeable = False
        digest = hashlib.sha256(self._size.to_bytes(4, "little"))
        digest.update(pixels)
        self._pixels += image.width * image.height
        return LoadedImage(source_name, rgb, digest.digest(), image.width, image.height, stored, self._limits)

    def _decode(self, source: Source, pixels: memoryview, described: str) -> tuple[Prepared, bytes]:
        """Decode an encoded image, in a worker process if the limits say so."""
        limits, began = self._limits, time.monotonic()
        data = read_bytes(source, limits, described, self._cancellation)
        too_much = self._stored + len(data) > limits.max_image_bytes

        def admit(width: int, height: int) -> None:
            self._check_pixels(width * height, described)

        if limits.isolate_images:
            seconds = began + limits.image_timeout_s - time.monotonic()
            job = Job(data, self._size, limits, described, too_much, seconds)
            image = shared_pool().decode(job, pixels, admit, self._cancellation)
        else:
            image = prepare(data, self._size, limits, described, admit, too_much)
            pixels[:] = image.rgb
        stored = image.preview or data
        self._stored += len(stored)
        return image, stored

    def _convert(self, source: Any, pixels: memoryview, described: str) -> tuple[Prepared, Image.Image]:
        """Convert an image that is decoded already, or opened by the caller with PIL."""
        original, remarks = _converted(source, self._limits, described)
        self._check_pixels(original.width * original.height, described)
        pixels[:] = resize(original, self._size)
        return Prepared(pixels, original.width, original.height, remarks, None), original

    def _check_pixels(self, more: int, described: str) -> None:
        total, limit = self._pixels + more, self._limits.max_request_pixels
        if total > limit:
            raise ImageError(
                f"{described} brings the images of the prompt to {total:,} pixels, over the limit of {limit:,}: "
                "ask about fewer at a time, shrink them, or raise max_request_pixels"
            )


def load_image(
    source: ImageSource, size: int, limits: ImageLimits | None = None, name: str | None = None
) -> LoadedImage:
    """Read an image and resize it to size x size.

    `name` ("image 2") precedes the source in error messages. Raises `ImageError` for an image that cannot be read or
    exceeds a limit, and `DownloadError` for a URL that cannot or may not be fetched.
    """
    return ImageReader(size, limits or ImageLimits()).read(source, name)


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


def _converted(source: Any, limits: ImageLimits, described: str) -> Decoded:
    """A PIL image or an array in RGB at its original size."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        return convert(source, limits, described)
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


def _empty(size: int) -> tuple[np.ndarray[Any, Any], memoryview]:
    """An array of uint8 [size, size, 3], and its bytes."""
    import numpy as np

    # A request keeps its images until it finishes. On the heap they would sit between the activations of steps and
    # leave holes that no later step fits.
    pixels = memoryview(mmap.mmap(-1, 3 * size * size))
    return np.frombuffer(pixels, dtype=np.uint8).reshape(size, size, 3), pixels
