"""Images decoded in worker processes: equal to decoding here, and limited (FAULTS H4, H5)."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.serving import hostile_images as hostile
from qvl_runtime.errors import ConfigError, ImageError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.images import ImageReader, load_image
from qvl_runtime.prompt.isolation import process
from qvl_runtime.prompt.isolation.pool import Pool
from qvl_runtime.prompt.limits import CAN_ISOLATE, ImageLimits

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not CAN_ISOLATE, reason="needs a POSIX system")]
ISOLATED = ImageLimits(isolate_images=True)
TILE = np.random.default_rng(0).integers(0, 256, (37, 53, 4), np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(TILE).convert(mode).save(file, kind, **options)
    return file.getvalue()


class TestEqual:
    @pytest.mark.parametrize(
        ("kind", "mode"),
        [
            *(("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P")),
            *(("PNG", "1"), ("WEBP", "RGBA"), ("GIF", "RGB"), ("BMP", "RGB"), ("TIFF", "RGBA"), ("PPM", "RGB")),
        ],
    )
    def test_to_the_bit(self, kind: str, mode: str) -> None:
        data = encoded(kind, mode)
        for options in ({}, {"transparency": "white"}):
            here = load_image(data, 56, ImageLimits(**options))
            there = load_image(data, 56, ImageLimits(isolate_images=True, **options))
            assert there.digest == here.digest and np.array_equal(there.rgb, here.rgb)
            assert (there.width, there.height, there.source) == (53, 37, here.source)
            assert np.array_equal(np.asarray(there.original), np.asarray(here.original))
            assert not there.rgb.flags.writeable

    def test_with_more_than_8_bits_and_turned(self) -> None:
        deep, turned = io.BytesIO(), io.BytesIO()
        Image.fromarray(TILE[:, :, 0].astype(np.uint16) * 257).save(deep, "PNG")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(TILE[:, :, :3]).save(turned, "PNG", exif=exif)
        for data, options in ((deep, {}), (deep, {"deep_pixels": "stretch"}), (turned, {"exif_orientation": "apply"})):
            here = load_image(data, 28, ImageLimits(**options))
            there = load_image(data, 28, ImageLimits(isolate_images=True, **options))
            assert (there.digest, there.width) == (here.digest, here.width)
            assert there.original.size == here.original.size == (there.width, there.height)

    def test_errors(self) -> None:
        for data in (b"", b"no image", encoded("PNG")[:200], encoded("JPEG")[:300], hostile.png(70_000, 1)):
            words = []
            for limits in (ImageLimits(), ISOLATED):
                with pytest.raises(ImageError) as caught:
                    load_image(data, 28, limits, name="image 3")
                words.append(str(caught.value))
            assert words[0] == words[1] and words[0].startswith("image 3 (")

    def test_remarks_are_logged(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(images, "_logged", set())
        load_image(encoded("PNG", "RGBA"), 28, ISOLATED)
        assert "has transparent pixels" in caplog.text

    def test_what_is_decoded_already_stays_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "shared_pool", lambda: pytest.fail("a worker was asked"))
        for source in (TILE, TILE[:, :, :3], Image.fromarray(TILE)):
            assert load_image(source, 28, ISOLATED).width == 53


class TestLimits:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: hostile.progressive_jpeg(1000, 20_000),
            lambda: hostile.ppm_with_comments(2**22),
            lambda: hostile.ppm_with_many_comments(2**22),
            lambda: hostile.ppm_of_few_shades(1000),
            lambda: hostile.png_of_many_chunks(2**22),
            lambda: hostile.plain_ppm(900),
        ],
    )
    def test_time(self, pool: Pool, make: Callable[[], bytes]) -> None:
        data, limits = make(), ImageLimits(isolate_images=True, image_timeout_s=0.2)
        load_image(encoded("PNG"), 28, ISOLATED)
        began = time.monotonic()
        with pytest.raises(ImageError, match=r"was not read within 0\.2 s: shrink it, save it in another format"):
            load_image(data, 28, limits)
        assert time.monotonic() - began < 3
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53

    def test_memory(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "_MEMORY_PER_PIXEL", 0)
        monkeypatch.setattr(process, "_MEMORY", 120 * 2**20)
        with pytest.raises(ImageError, match="needs more memory than there is"):
            load_image(hostile.color_png(), 28, ISOLATED)  # 160 MB
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53, "the same worker, or another"

    @pytest.mark.parametrize("isolated", [False, True])
    def test_sides(self, isolated: bool) -> None:
        limits = ImageLimits(isolate_images=isolated)
        for data in (hostile.png(1, 40_000_000), hostile.png(40_000_000, 1), hostile.png(65_536, 1)):
            with pytest.raises(ImageError, match="over the limit of 65,535 pixels a side: cut it into parts or raise"):
                load_image(data, 28, limits)
        assert load_image(hostile.png(65_535, 3), 28, limits).width == 65_535
        with pytest.raises(ImageError, match="over the limit of 65,535 pixels a side"):
            load_image(np.zeros((65_536, 1), np.uint8), 28, limits)
        with pytest.raises(ImageError, match="over the limit of 52 pixels a side"):
            load_image(Image.fromarray(TILE), 28, ImageLimits(max_image_side=52))

    @pytest.mark.parametrize("isolated", [False, True])
    def test_pixels_of_a_prompt(self, isolated: bool) -> None:
        pixels = 37 * 53
        reader = ImageReader(28, ImageLimits(max_request_pixels=4 * pixels, isolate_images=isolated))
        for source in (encoded("PNG"), TILE, encoded("JPEG"), Image.fromarray(TILE)):
            reader.read(source)
        for source in (encoded("GIF"), TILE, Image.fromarray(TILE)):
            message = (
                f"image 5 .* brings the images of the prompt to {5 * pixels:,} pixels, over the limit of 7,844: ask"
            )
            with pytest.raises(ImageError, match=message):
                reader.read(source, "image 5")
        with pytest.raises(ConfigError, match="max_request_pixels is 0"):
            ImageLimits(max_request_pixels=0)

    @pytest.mark.parametrize("isolated", [False, True])
    def test_what_is_kept_to_draw_on(self, isolated: bool) -> None:
        data = encoded("PNG", "RGB", compress_level=0)
        limits = ImageLimits(max_image_bytes=2 * len(data) + 10, isolate_images=isolated)
        reader = ImageReader(28, limits)
        first, second, third = (reader.read(data) for _ in range(3))
        assert first.stored == second.stored == data and isinstance(third.stored, bytes)
        assert third.stored.startswith(b"\xff\xd8") and third.original.size == (53, 37), "a copy, as JPEG"
        assert third.digest == first.digest
        large = ImageReader(28, ImageLimits(max_image_bytes=2**20, isolate_images=isolated))
        file = io.BytesIO()
        Image.new("RGB", (5000, 100)).save(file, "PNG", compress_level=1)
        large._stored = 2**20
        kept = large.read(file.getvalue())
        assert (kept.width, kept.height, kept.original.size) == (5000, 100, (2048, 41))
