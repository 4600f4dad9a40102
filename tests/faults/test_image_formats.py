"""Files that are no image that is read here: their kind is named, and nothing of them is repeated."""

from __future__ import annotations

import base64
import gzip
import io
import logging
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.decoding import decode, readable_formats
from qvl_runtime.prompt.file_kinds import HEAD, kind_of, refusal
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits
from tests.faults.image_files import DIGEST, PNG
from tests.faults.image_files import saved_pixels as saved


def tiff_with(data: bytes, *tags: tuple[int, int]) -> bytes:
    """A TIFF file with long tags added to its first directory."""
    from PIL import TiffImagePlugin

    entries = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags:
        entries[tag] = value
        entries.tagtype[tag] = 4
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "TIFF", tiffinfo=entries)
    return file.getvalue()


def ftyp(brand: bytes, *others: bytes) -> bytes:
    return struct.pack(">I", 16 + 4 * len(others)) + b"ftyp" + brand + bytes(4) + b"".join(others) + bytes(100)


OTHERS: list[tuple[str, bytes]] = [
    ("HEIC", ftyp(b"heic", b"mif1", b"heic")),
    ("HEIC", ftyp(b"mif1", b"mif1", b"heic", b"miaf")),
    ("HEIC", ftyp(b"hevc")),
    ("AVIF", ftyp(b"avis")),
    ("MP4 video", ftyp(b"isom", b"isom", b"avc1")),
    ("QuickTime video", ftyp(b"qt  ")),
    ("camera raw", ftyp(b"crx ")),
    ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + ftyp(b"jp2 ")),
    ("JPEG 2000", b"\xff\x4f\xff\x51\0\x2f"),
    ("JPEG XL", b"\xff\x0a\xfa\x1f"),
    ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    ("SVG", b'\xef\xbb\xbf\n<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD">\n<!-- x --><svg>'),
    ("HTML", b"<!DOCTYPE html><html>secret"),
    ("HTML", b"\n\n<!-- banner -->\n<HTML lang='en'>"),
    ("XML", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    ("JSON", b'{"error": "token=hunter2"}'),
    ("PDF", b"%PDF-1.7\n"),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    ("ICO", saved("ICO")),
    ("ICNS", b"icns\0\0\1\0"),
    ("PSD", b"8BPS\0\1"),
    ("OpenEXR", b"v/1\x01\2\0\0\0"),
    ("DICOM", bytes(128) + b"DICM\2\0"),
    ("FITS", b"SIMPLE  =                    T"),
    ("camera raw", b"II*\0\x10\0\0\0CR\2\0" + bytes(100)),
    ("camera raw", b"FUJIFILMCCD-RAW 0201"),
    ("gzip", gzip.compress(PNG)),
    ("zip", b"PK\3\4\x14\0"),
    ("Matroska or WebM video", b"\x1a\x45\xdf\xa3\x9f"),
    ("AVI video", b"RIFF\0\0\0\0AVI LIST"),
    ("WAV audio", b"RIFF\0\0\0\0WAVEfmt "),
    ("NumPy array file", b"\x93NUMPY\1\0v\0"),
    ("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
    ("base64", base64.b64encode(PNG)),
    ("a data URL inside a file", b"data:image/png;base64,AAAA"),
]


class TestOtherFormats:
    """conduit#320, hermes-agent#106408, okuna-api#414."""

    @pytest.mark.parametrize(("kind", "data"), OTHERS, ids=[kind for kind, _ in OTHERS])
    def test_named(self, kind: str, data: bytes) -> None:
        assert (kind_of(data) or "").startswith(kind)
        with pytest.raises(ImageError) as caught:
            load_image(data, 28, name="image 2")
        message = str(caught.value)
        assert message.startswith(f"image 2 ({len(data):,} bytes) ")
        assert f"its first bytes say {kind}" in message or (kind == "AVIF" and "AVIF" in message)
        assert ";" in message or kind == "AVIF"  # the way out

    def test_the_ways_out(self) -> None:
        for kind, way_out in [
            ("HEIC", "save it as JPEG or PNG"),
            ("gzip", "unpack it"),
            ("MP4 video", "a frame of it"),
        ]:
            data = next(data for name, data in OTHERS if name == kind)
            assert way_out in refusal(data, readable_formats())

    @pytest.mark.parametrize(
        "secret",
        [
            b"root:*:20000:0:99999:7:::\n",
            b"PASSWORD=hunter2\n",
            b"ADMIN_TOKEN=hunter2",
            b"HOME=/root\0PATH=/bin",
            b"-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2",
            b"P5 hunter2 4 255\n",
            b"P6\nhunter2",
            b"P6 4 4 hunter2-secret-PASSWORD ",
            b"P3 2 2 9 hunter2-secret 1 1",
            b"P1 2 2 hunter2-secret 1 1",
            b"P5\n4 4\nhunter2",
            b"GIF89ahunter2 secret PASSWORD",
            b"BMhunter2 PASSWORD secret",
            b"\x89PNG\r\n\x1a\nhunter2 PASSWORD",
            b"II*\0hunter2 PASSWORD",
            b"RIFFxxxxWEBPhunter2",
            b"\xff\xd8\xff\xe0hunter2 PASSWORD root",
            b'{"password": "hunter2"}',
            b"<html>hunter2</html>",
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_nothing_that_was_read_is_repeated(self, secret: bytes, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(secret)
        for source in (secret, tmp_path / "f", io.BytesIO(secret)):
            with pytest.raises(ImageError) as caught:
                load_image(source, 28)
            text = str(caught.value).replace(str(tmp_path), "")
            assert not re.search("hunter2|PASSW|root|ADMIN|BEGIN|HOME=|secret", text), text

    @pytest.mark.filterwarnings("ignore")
    def test_pil_errors_that_quote_the_file(self) -> None:
        """Every message of PIL's about a mutated header stays free of `b'...'`."""
        random = np.random.default_rng(1)
        for kind in ("PPM", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"):
            data = saved(kind)
            for _ in range(40):
                damaged = bytearray(data)
                for at in random.integers(0, min(len(data), 60), 4):
                    damaged[at] = random.integers(256)
                try:
                    decode(bytes(damaged), ImageLimits(), "it")
                except ImageError as error:
                    assert not re.search(r"\bb['\"]", str(error)), error

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
    def test_avif_is_read(self) -> None:
        smooth = np.add.outer(np.arange(20) * 5, np.arange(30) * 5).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.dstack([smooth] * 3)).save(file, "AVIF", quality=95)
        rgb = load_image(file, 28).original
        assert np.abs(np.asarray(rgb)[..., 1].astype(int) - smooth).max() < 10
        data = file.getvalue()
        with pytest.raises(ImageError, match="damaged"):
            load_image(data[: len(data) // 2], 28)

    def test_a_pillow_without_avif_names_it(self) -> None:
        assert "its first bytes say AVIF; save it as JPEG or PNG" in refusal(ftyp(b"avif"), ("JPEG", "PNG"))

    def test_raw_photos_are_not_taken_for_their_thumbnails(self) -> None:
        tiff = saved("TIFF")
        for tags in ([(50706, 0x01040000)], [(254, 1), (330, 8)]):  # DNG; NEF and ARW
            with pytest.raises(ImageError, match="is camera raw, which is not read: develop it to JPEG or PNG"):
                load_image(tiff_with(tiff, *tags), 28)
        assert load_image(tiff_with(tiff, (254, 0)), 28).digest == DIGEST

    def test_a_damaged_header_of_a_known_format(self) -> None:
        with pytest.raises(ImageError, match="starts like PNG, but its header is damaged: send the image again"):
            load_image(PNG[:12] + bytes(50), 28)

    def test_odd_heads(self) -> None:
        random = np.random.default_rng(0)
        for length in (0, 1, 3, 4, 8, 12, 16, 131, HEAD):
            for _ in range(20):
                head = random.bytes(length)
                assert kind_of(head) is None or isinstance(kind_of(head), str)
                assert kind_of(b"\xff\xff\xff\xffftyp" + head) and kind_of(bytes(4) + b"ftyp" + head)
        assert kind_of(b"hello") is None and "is not an image of a known format" in refusal(b"hello", ("JPEG",))


class TestLargePhotos:
    """HilbertRaum#118, realesrgan-gui#34."""

    @pytest.mark.parametrize("size", [(8064, 6048), (8160, 6144), (9248, 6936)])  # phones of 48, 50 and 64 megapixels
    def test_pass_by_default(self, size: tuple[int, int]) -> None:
        ImageLimits().check_pixels(*size, "the photo")

    def test_48_megapixels_are_read(self) -> None:
        file = io.BytesIO()
        Image.new("L", (8064, 6048), 77).save(file, "JPEG", quality=50)
        image = load_image(file, 28)
        assert (image.width, image.height) == (8064, 6048) and (image.rgb == 76).all()


def test_warnings_name_the_image(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "_logged", set())
    Image.new("RGBA", (4, 4)).save(tmp_path / "logo.png")
    with caplog.at_level(logging.WARNING):
        load_image(tmp_path / "logo.png", 28)
    assert f"{tmp_path}/logo.png has transparent pixels" in caplog.text
