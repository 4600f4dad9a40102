"""Images of every mode, and files that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits

SIZE = 32
RAMP8 = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE).astype(np.uint8)  # every value, four times
RAMP16 = RAMP8.astype(np.uint16) * 257
RAMP1 = (RAMP8 / 255).astype(np.float32)


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
NO_FILES = ImageLimits(allow_files=False)


def saved_pixels(kind: str, **options: Any) -> bytes:
    return saved(PIXELS, kind, **options)


PNG = saved_pixels("PNG")
DIGEST = load_image(PIXELS, 28).digest


def seen(source: Any, limits: ImageLimits | None = None) -> np.ndarray:
    """What the model sees at a size that needs no resizing; one channel if all are equal."""
    rgb = load_image(source, SIZE, limits).rgb
    return rgb[:, :, 0] if (rgb == rgb[:, :, :1]).all() else rgb


def big_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">"))


def pgm(array: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*array.shape[::-1], white) + array.astype(">u2").tobytes()


def png16(array: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write in color."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )


def tagged(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF file with another value of a tag that has one short or long."""
    for kind in (3, 4):
        at = data.find(struct.pack("<HHI", tag, kind, 1))
        if at >= 0:
            return data[: at + 8] + struct.pack("<I", value) + data[at + 12 :]
    raise AssertionError(f"no tag {tag}")


def ink(mode: str) -> Image.Image:
    """A black square on transparent black: all of it is in the alpha channel."""
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 8, 24, 24))
    if mode in ("La", "RGBa"):
        return image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    return image.convert(mode)


def palette_with_transparency() -> bytes:
    indices = np.zeros((SIZE, SIZE), np.uint8)
    indices[8:24, 8:24] = 1
    image = Image.new("P", (SIZE, SIZE))
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette([0, 0, 0, 0, 0, 0] + [9] * 762)
    return saved(image, "PNG", transparency=bytes([0, 255]))


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pattern = np.dstack([np.repeat(RAMP8[:12], 2, axis=0)] * 3)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    return saved(pattern, kind, exif=exif, **lossless)
