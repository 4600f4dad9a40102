from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qvl_runtime.errors import ConfigError, DownloadError, ImageError
from qvl_runtime.prompt.images import MEAN, STD, LoadedImage, load_image, to_pixels
from qvl_runtime.prompt.limits import ImageLimits


@pytest.fixture(scope="session")
def pattern() -> np.ndarray:
    """Every channel differs from its neighbors; 37 x 53, so that no side divides another."""
    rows, columns = np.mgrid[0:37, 0:53]
    return np.stack([rows * 7 + columns, rows * columns, rows * 3 ^ columns * 5], axis=-1).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel, so that anything that decoded it would fail otherwise."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\xff\xffIDAT"


class TestGoldens:
    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("beach.jpg", "a"),
            ("city.png", "b"),
            ("exif6.jpg", "odd.exif6.jpg"),
            ("gray.png", "odd.gray.png"),
            ("palette.png", "odd.palette.png"),
            ("rgba.png", "odd.rgba.png"),
        ],
    )
    def test_resized_bytes(self, full_golden: Path, name: str, key: str) -> None:
        expected = load_file(full_golden / "vision.safetensors")[f"{key}.resized_u8"]
        assert np.array_equal(load_image(full_golden / "images" / name, 168).rgb, expected.numpy())

    def test_pixels(self, full_golden: Path) -> None:
        expected = load_file(full_golden / "vision.safetensors")["a.pixels"]
        pixels = to_pixels(load_image(full_golden / "images/beach.jpg", 168).rgb[None])
        assert torch.allclose(pixels[0], expected, rtol=0, atol=1e-6)

    def test_at_the_released_size_to_the_bit(self, full_golden: Path) -> None:
        digests = json.loads((full_golden / "preprocess448.json").read_text())
        rgb = load_image(full_golden / digests["image"], 448).rgb
        assert hashlib.sha256(rgb.tobytes()).hexdigest() == digests["sha256_of_resized_u8_bytes_HWC"]
        pixels = to_pixels(rgb[None])[0].contiguous().numpy()
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == digests["sha256_of_float32_pixels_bytes_CHW"]


class TestSources:
    def test_one_image_from_everywhere(self, pattern: np.ndarray, tmp_path: Path) -> None:
        data = encoded(pattern)
        path = tmp_path / "图 1.png"
        path.write_bytes(data)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        broken_lines = url.replace("A", "A\n", 3).rstrip("=")
        sources = [path, str(path), data, bytearray(data), url, broken_lines, pattern, Image.fromarray(pattern)]
        images = [load_image(source, 28) for source in sources]
        assert len({image.digest for image in images}) == 1
        assert {(image.width, image.height) for image in images} == {(53, 37)}
        for image in images:
            assert image.rgb.shape == (28, 28, 3) and image.rgb.dtype == np.uint8
            assert not image.rgb.flags.writeable
            assert np.array_equal(np.asarray(image.original), pattern)
            assert "\n" not in image.source

    def test_digest_is_of_what_the_model_sees(self, pattern: np.ndarray) -> None:
        same = load_image(pattern, 28)
        other = pattern.copy()
        other[0, 0, 0] ^= 255
        assert load_image(pattern.copy(), 28).digest == same.digest
        assert load_image(other, 28).digest != same.digest
        plain = np.zeros((9, 9, 3), np.uint8)
        digest = hashlib.sha256((28).to_bytes(4, "little") + bytes(28 * 28 * 3)).digest()
        assert load_image(plain, 28).digest == digest
        assert load_image(plain, 14).digest != digest

    def test_resize_is_pinned(self, pattern: np.ndarray) -> None:
        """PIL's bicubic kernel, up and down: numbers made once, with Pillow 13.0."""
        digests = [hashlib.sha256(load_image(pattern, size).rgb.tobytes()).hexdigest()[:16] for size in (28, 112)]
        assert digests == ["96642a9a531feb1d", "a16d76eda3666047"]

    def test_a_size_that_fits_is_left_alone(self, pattern: np.ndarray) -> None:
        square = pattern[:37, :37]
        assert np.array_equal(load_image(square, 37).rgb, square)

    def test_array_shapes(self, pattern: np.ndarray) -> None:
        gray = pattern[:, :, 0]
        as_rgb = np.repeat(gray[:, :, None], 3, axis=2)
        alpha = np.dstack([pattern, np.zeros_like(gray)])
        assert load_image(gray, 28).digest == load_image(gray[:, :, None], 28).digest == load_image(as_rgb, 28).digest
        assert load_image(alpha, 28).digest == load_image(pattern, 28).digest, "alpha is dropped, not composited"
        assert load_image(pattern[::-1, ::2], 28).digest == load_image(pattern[::-1, ::2].copy(), 28).digest

    def test_the_callers_image_stays_its_own(self, pattern: np.ndarray) -> None:
        source = Image.fromarray(pattern)
        image = load_image(source, 28)
        source.putpixel((0, 0), (1, 2, 3))
        assert np.array_equal(np.asarray(image.original), pattern)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (np.zeros((3, 4, 5), np.uint8), "ndarray 3 x 4 x 5 has the wrong shape"),
            (np.zeros((0, 4, 3), np.uint8), "wrong shape"),
            (np.zeros(4, np.uint8), "wrong shape"),
            (Image.new("RGB", (0, 5)), "no pixels"),
            (7, "int is not an image"),
            (None, "NoneType is not an image"),
            (b"", "is empty"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image that is read here: its first bytes say PostScript"),
            ("ftp://host/a.png", "scheme 'ftp'"),
            ("data:image/png,raw", "expected data:image"),
            ("data:image/png;base64,@@@@", "not base64"),
            ("no\0pe.png", "cannot be read"),
            ("x" * 5000, "cannot be read"),
            (".", "not a regular file"),
        ],
    )
    def test_faults(self, source: object, message: str) -> None:
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source, 28)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    def test_a_missing_file_is_named(self) -> None:
        with pytest.raises(ImageError, match=r"^image 3 \(cats/tom\.png\) does not exist"):
            load_image("cats/tom.png", 28, name="image 3")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageError, match="not a regular file"):
            load_image(tmp_path / "pipe.png", 28)


class TestLimits:
    @pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 8_000), (140_000, 500)])
    def test_pixels_are_counted_before_decoding(self, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match="over the limit of 67,108,864 pixels") as caught:
            load_image(png_header(*size), 28)
        assert "\n" not in str(caught.value)

    def test_pixels_of_arrays_and_pil(self, pattern: np.ndarray) -> None:
        limits = ImageLimits(max_image_pixels=37 * 53 - 1)
        for source in (pattern, Image.fromarray(pattern), encoded(pattern)):
            with pytest.raises(ImageError, match="is 53 x 37, over the limit of 1,960 pixels"):
                load_image(source, 28, limits)
        assert load_image(pattern, 28, ImageLimits(max_image_pixels=37 * 53)).width == 53

    def test_bytes(self, pattern: np.ndarray, tmp_path: Path) -> None:
        data = encoded(pattern)
        path = tmp_path / "a.png"
        path.write_bytes(data)
        limits = ImageLimits(max_image_bytes=len(data) - 1)
        for source in (data, path, "data:image/png;base64," + base64.b64encode(data).decode()):
            with pytest.raises(ImageError, match=f"over the limit of {len(data) - 1:,}"):
                load_image(source, 28, limits)
        assert load_image(path, 28, ImageLimits(max_image_bytes=len(data))).width == 53

    def test_files_and_urls_can_be_refused(self, tmp_path: Path) -> None:
        closed = ImageLimits(allow_files=False, allow_urls=False)
        for path in ("/etc/passwd", tmp_path / "a.png"):
            with pytest.raises(ImageError, match="is a file path, which is not allowed here"):
                load_image(path, 28, closed)
        with pytest.raises(DownloadError, match="allow_urls"):
            load_image("http://example.com/a.png", 28, closed)

    @pytest.mark.parametrize(
        "wrong", [{"max_image_bytes": 0}, {"max_image_pixels": -1}, {"image_timeout_s": 0}, {"max_images": -1}]
    )
    def test_limits_are_checked(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
            ImageLimits(**wrong)


class TestDamage:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    def test_a_cut_file(self, pattern: np.ndarray, kind: str) -> None:
        data = encoded(pattern, kind)
        assert load_image(data, 28).width == 53
        with pytest.raises(ImageError) as caught:
            load_image(data[: len(data) // 2], 28, name="image 1")
        assert str(caught.value).startswith("image 1 (") and "\n" not in str(caught.value)

    def test_a_broken_jpeg_is_named(self, pattern: np.ndarray, tmp_path: Path) -> None:
        path = tmp_path / "holiday.jpg"
        path.write_bytes(encoded(pattern, "JPEG")[:-300])
        with pytest.raises(ImageError, match=r"holiday\.jpg is damaged: image file is truncated"):
            load_image(path, 28)

    def test_flipped_bytes_never_raise_anything_else(self, pattern: np.ndarray) -> None:
        random = np.random.default_rng(0)
        refused = 0
        for kind in ("JPEG", "PNG", "WEBP", "GIF"):
            data = encoded(pattern, kind)
            for _ in range(60):
                damaged = bytearray(data)
                for position in random.integers(0, len(data), 6):
                    damaged[position] = random.integers(256)
                try:
                    assert isinstance(load_image(bytes(damaged), 28), LoadedImage)
                except ImageError:
                    refused += 1
        assert refused > 60


def test_to_pixels() -> None:
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (2, 7, 7, 3), dtype=np.uint8)
    pixels = to_pixels(rgb)
    exact = ((rgb / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 7, 7) and pixels.is_contiguous()
    assert np.abs(pixels.numpy() - exact).max() < 1e-6
    assert to_pixels(rgb[:0]).shape == (0, 3, 7, 7)
