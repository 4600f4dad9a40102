"""Name the kind of a file from its first bytes, so that a refusal says what was sent and never repeats it."""

from __future__ import annotations

import re

HEAD = 512
"""Number of first bytes that are looked at."""

# What people send instead of an image, by the bytes at the start.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "CUR"),
    (b"icns", "ICNS"),
    (b"8BPS", "PSD"),
    (b"gimp xcf", "XCF"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\xabKTX ", "KTX"),
    (b"AT&TFORM", "DjVu"),
    (b"SIMPLE  =", "FITS"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x93NUMPY", "NumPy array file"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIRO", "camera raw"),
    (b"IIRS", "camera raw"),
    (b"MMOR", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"FOVb", "camera raw"),
    (b"\0MRM", "camera raw"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\3\4", "zip (or a format inside one, such as DOCX or EPUB)"),
    (b"PK\5\6", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office format"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"\0\0\1\xba", "MPEG video"),
    (b"\0\0\1\xb3", "MPEG video"),
    (b"FLV\1", "Flash video"),
    (b"0&\xb2u\x8ef\xcf\x11", "Windows Media"),
    (b"OggS", "Ogg"),
    (b"ID3", "MP3 audio"),
    (b"fLaC", "FLAC audio"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs.github.com/spec/", "Git LFS pointer"),
)

# The major brand of an ISO base media file, at byte 8.
_BRANDS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"avi[fos]"), "AVIF"),
    (re.compile(rb"hei[cxms]|hev[cxms]|mif[12]|msf1"), "HEIC"),
    (re.compile(rb"crx "), "camera raw"),
    (re.compile(rb"jp[2xm] "), "JPEG 2000"),
    (re.compile(rb"qt  "), "QuickTime video"),
)

# Texts, whatever white space or byte order mark is before them.
_TEXTS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"<svg\b|(?:<[?!][^>]*>\s*)+<svg\b", re.IGNORECASE), "SVG"),
    (
        re.compile(rb"(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body|title|script)\b", re.IGNORECASE | re.DOTALL),
        "HTML",
    ),
    (re.compile(rb"<\?xml\b|<!DOCTYPE\b|<[A-Za-z][\w:-]*[\s>]", re.IGNORECASE), "XML"),
    (re.compile(rb'\{\s*["}]|\[\s*[\[{"]'), "JSON"),
    (re.compile(rb"data:image/"), "a data URL inside a file"),
    (re.compile(rb"/9j/[A-Za-z0-9+/\s]{40}|iVBORw0KGgo|R0lGOD[dl]h|UklGR[A-Za-z0-9+/\s]{40}"), "base64"),
)

_ADVICE = {
    "HEIC": "save it as JPEG or PNG (an iPhone takes JPEG with Camera > Formats > Most Compatible)",
    "SVG": "render it to PNG",
    "PDF": "render its page to PNG",
    "PostScript": "render its page to PNG",
    "HTML": "the address or file is a web page: use that of the image itself",
    "JSON": "the address or file is data or an error: use that of the image itself",
    "XML": "the address or file is data or an error: use that of the image itself",
    "Git LFS pointer": "run git lfs pull to fetch the image itself",
    "base64": "decode it, or send data:image/...;base64,... as a string",
    "a data URL inside a file": "send its text as a string",
    "NumPy array file": "load it and pass the array",
    "DICOM": "convert it to PNG with the window that you want",
    "FITS": "convert it to PNG with the range that you want",
    "camera raw": "develop it to JPEG or PNG",
}
_PACKED = ("gzip", "zip", "bzip2", "xz", "Zstandard", "7-Zip", "RAR")


def kind_of(head: bytes) -> str | None:
    """The name of the format that a file's first `HEAD` bytes announce, such as "HEIC"; None if they are unknown."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return next((name for pattern, name in _BRANDS if pattern.match(brand)), None) or _by_other_brands(head)
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"AVI ": "AVI video", b"WAVE": "WAV audio"}.get(head[8:12])
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    if re.match(rb"P[1-6]\s", head):
        return "PPM"
    if head[8:10] == b"CR" and head[:4] == b"II*\0":
        return "camera raw"
    if head[128:132] == b"DICM":
        return "DICOM"
    if name := next((name for start, name in _STARTS if head.startswith(start)), None):
        return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((name for pattern, name in _TEXTS if pattern.match(text)), None)


def refusal(head: bytes, readable: tuple[str, ...]) -> str:
    """Why a file with these first bytes is not read, and what to do: the end of a sentence about the image.

    `readable` are the names of the formats that are. Nothing of the bytes is repeated: the file may be a secret, named
    by a stranger.
    """
    if not head:
        return "is empty (0 bytes): send the image again"
    kind, formats = kind_of(head), ", ".join(readable)
    if kind is None:
        return f"is not an image of a known format; expected {formats}"
    if kind.upper() in readable:
        return f"starts like {kind}, but its header is damaged: send the image again"
    packed = "unpack it and send the image itself" if kind.startswith(_PACKED) else "save it as JPEG or PNG"
    if "video" in kind:
        packed = "send a frame of it as JPEG or PNG"
    return f"is not an image that is read here: its first bytes say {kind}; {_ADVICE.get(kind, packed)}"


def _by_other_brands(head: bytes) -> str:
    """The kind of an ISO base media file with an unknown major brand, from the compatible brands in its first box."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[at : at + 4] for at in range(16, size - 3, 4)]
    for pattern, name in _BRANDS:
        if any(map(pattern.match, brands)):
            return name
    return "MP4 video"
