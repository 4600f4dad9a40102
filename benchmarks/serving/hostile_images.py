"""Image files that cost far more to read than to send. Each is within the default limit on encoded bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image


def progressive_jpeg(side: int = 6000, scans: int = 2000) -> bytes:
    """A progressive JPEG whose last scan is repeated: each repetition refines all coefficients again."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")  # of the last scan, with the table before it if there is one
    table = data.rfind(b"\xff\xc4", 0, start)
    scan = data[max(start if table < data.rindex(b"\xff\xda", 0, start) else table, 0) : -2]
    return data[:-2] + scan * scans + data[-2:]


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, made without its pixels in memory."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = max(1, 2**20 // len(row))
    packed = [packer.compress(row * min(rows, height - top)) for top in range(0, height, rows)]
    body = b"".join(packed) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + (_chunk(b"IDAT", body) + _chunk(b"IEND", b""))
    )


def color_png(side: int = 6324) -> bytes:
    """A PNG of 40 megapixels in color, in 0.12 MB."""
    packer = zlib.compressobj(9)
    row = b"\0" + bytes(3 * side)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack("!IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def ppm_with_comments(size: int = 18 * 2**20) -> bytes:
    """A PPM file that is nearly all comments, which Pillow reads in Python, byte by byte."""
    return b"P6\n" + b"#" * size + b"\n2 2\n255\n" + bytes(12)


def ppm_with_many_comments(size: int = 18 * 2**20) -> bytes:
    """The same with a comment a line."""
    return b"P6\n" + b"#\n" * (size // 2) + b"2 2\n255\n" + bytes(12)


def ppm_of_few_shades(side: int = 2580) -> bytes:
    """A PPM file of 3 bits a channel, which Pillow scales in Python, value by value."""
    return b"P6\n%d %d\n7\n" % (side, side) + bytes(3 * side * side)


def plain_ppm(side: int = 1800) -> bytes:
    """A PPM file whose numbers are text."""
    return b"P3\n%d %d\n255\n" % (side, side) + b"0 " * (3 * side * side)


def webp(side: int = 8000) -> bytes:
    """A lossless WebP of 64 megapixels, for which its decoder takes 16 bytes each."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


def gif_with_a_huge_frame(side: int = 65535) -> bytes:
    """A GIF whose canvas is 1 x 1 and whose frame is 65,535 x 65,535."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff_with_many_tags(count: int = 1_100_000) -> bytes:
    """A TIFF file whose directories follow one another, each with one tag."""
    one = struct.Struct("<HHHIII")
    entries = (one.pack(1, 256, 4, 1, 1, 8 + (n + 1) * one.size) for n in range(count - 1))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(entries) + one.pack(1, 256, 4, 1, 1, 0)


def tiff_bomb(side: int = 8000) -> bytes:
    """A TIFF file of 64 megapixels, packed to 0.2 MB in one strip."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "TIFF", compression="tiff_adobe_deflate")
    return file.getvalue()


def png_of_many_chunks(size: int = 18 * 2**20) -> bytes:
    """A PNG with a million text chunks in front of its pixels."""
    chunk = _chunk(b"tEXt", b"a\0b")
    head = struct.pack("!IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    body = _chunk(b"IDAT", zlib.compress(bytes(72)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + chunk * (size // len(chunk)) + body + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))


FILES: dict[str, Callable[[], bytes]] = {
    "progressive JPEG, 36 MP, 2,000 scans": progressive_jpeg,
    "progressive JPEG, 4 MP, 2,000 scans": lambda: progressive_jpeg(2000),
    "PPM with one comment of 18 MB": ppm_with_comments,
    "PPM with 9 million comments": ppm_with_many_comments,
    "PPM of maxval 7, 20 MB": ppm_of_few_shades,
    "PPM in text, 20 MB": plain_ppm,
    "PNG of 1 x 40,000,000": lambda: png(1, 40_000_000),
    "PNG of 40,000,000 x 1": lambda: png(40_000_000, 1),
    "PNG of 40 MP": color_png,
    "PNG with 1.2 million chunks": png_of_many_chunks,
    "WebP of 64 MP": webp,
    "GIF with a frame of 65,535 x 65,535": gif_with_a_huge_frame,
    "TIFF of 64 MP in one strip": tiff_bomb,
    "TIFF of 1,100,000 directories": tiff_with_many_tags,
}
