"""Images of more than 8 bits, which PIL's `convert("RGB")` would show white or black."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits

from .image_files import (
    RAMP1,
    RAMP8,
    RAMP16,
    SIZE,
    big_endian,
    pgm,
    png16,
    saved,
    seen,
    tagged,
)

STRETCH = ImageLimits(deep_pixels="stretch")


class TestDeepPixels:
    """Pillow#2574, Pillow#3011, Pillow#5991."""

    @pytest.mark.parametrize(
        "source",
        [
            RAMP16,
            big_endian(RAMP16),
            RAMP16[:, :, None],
            np.dstack([RAMP16] * 3),
            saved(RAMP16, "PNG"),
            saved(RAMP16, "TIFF"),
            saved(big_endian(RAMP16), "TIFF"),
            saved(RAMP16, "TIFF", compression="tiff_lzw"),
            saved(Image.fromarray(RAMP16.astype(np.int32)), "PPM"),
            pgm(RAMP8.astype(np.uint16) * 16, 4080),  # its header says which value is white
            png16(np.dstack([RAMP16] * 3)),
            png16(np.dstack([RAMP16, RAMP16 * 0 + 65535])),
            Image.fromarray(RAMP16),
            Image.fromarray(big_endian(RAMP16)),
            Image.open(io.BytesIO(pgm(RAMP16, 65535))),
            RAMP1,
            RAMP1.astype(np.float64),
            RAMP1.astype(np.float16),
            big_endian(RAMP1),
            np.dstack([RAMP1] * 3),
            saved(RAMP1, "TIFF"),
            Image.fromarray(RAMP1),
        ],
        ids=lambda source: images.describe(source),
    )
    def test_scaled_by_the_range(self, source: Any) -> None:
        assert np.array_equal(seen(source), RAMP8)

    def test_one_whole_value_may_be_lost_nowhere_else(self) -> None:
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        rgb = load_image(values, 256).rgb[:, :, 0]
        assert np.array_equal(rgb, (values >> 8).astype(np.uint8)), "the high byte, as PIL reads 16-bit color"

    def test_color(self) -> None:
        channels = [RAMP8, RAMP8.T, 255 - RAMP8]
        expected = np.dstack(channels)
        for source in (expected.astype(np.uint16) * 257, (expected / 255).astype(np.float32)):
            assert np.array_equal(seen(source), expected)
            with_alpha = np.dstack([source, np.full_like(source[:, :, 0], source.max())])
            assert np.array_equal(seen(with_alpha), expected)

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            (RAMP8.astype(np.uint16) * 16, "uint16 from 0 to 4,080, less than a quarter of 0 to 65,535"),  # an X-ray
            (RAMP8.astype(np.uint16) * 64, "from 0 to 16,320"),  # 14 bits
            (RAMP8.astype(np.uint16), "from 0 to 255"),
            (RAMP8.astype(np.uint16) * 16 + 32768, "from 32,768 to 36,848"),  # Hounsfield units with an offset
            (saved(RAMP8.astype(np.uint16) * 16, "PNG"), "16-bit pixels from 0 to 4,080"),
            (saved(RAMP8.astype(np.uint16) * 16, "TIFF"), "16-bit pixels from 0 to 4,080"),
            (pgm(RAMP8.astype(np.uint16) * 4, 65535), "16-bit pixels from 0 to 1,020"),
            (Image.fromarray(RAMP8.astype(np.uint16)), "16-bit pixels from 0 to 255"),
            (Image.fromarray(RAMP16.astype(np.int32)), "32-bit integer pixels from 0 to 65,535, and which value"),
            (png16(np.dstack([RAMP8.astype(np.uint16) * 16] * 3)), "16-bit color, its high bytes from 0 to 15"),
            (b"P6 32 32 65535\n" + np.dstack([RAMP8] * 3).astype(">u2").tobytes(), "high bytes from 0 to 1"),
            (np.dstack([RAMP8.astype(np.uint16)] * 3 + [RAMP16]), "from 0 to 255"),  # alpha does not make it brighter
            (RAMP8.astype(np.int32), "int32 from 0 to 255, and which value is white is not known"),
            (RAMP8.astype(np.int64), "int64 from 0 to 255"),
            (RAMP8.astype(np.int16) - 128, "int16 from -128 to 127"),
            (RAMP16.astype(np.uint32), "uint32 from 0 to 65,535"),
            (RAMP8.astype(np.float32), "float32 from 0 to 255; expected 0 to 1"),
            (RAMP1 - 0.5, "from -0.5 to 0.5; expected 0 to 1"),
            (RAMP1 / 100, "from 0 to 0.01, less than a quarter"),
            (saved(RAMP1 * 9, "TIFF"), "float pixels from 0 to 9"),
            (saved(Image.fromarray(RAMP16.astype(np.int32) * 9), "TIFF"), "32-bit integer pixels from 0 to 589,815"),
        ],
    )
    def test_refused_with_both_ends_and_stretched_on_request(self, source: Any, found: str) -> None:
        with pytest.raises(ImageError) as caught:
            load_image(source, SIZE)
        assert found in str(caught.value)
        assert "convert it to 8 bits with the range that you want, or set deep_pixels to 'stretch'" in str(caught.value)
        stretched = seen(source, STRETCH).astype(int)
        assert (stretched.min(), stretched.max()) == (0, 255)
        if "high bytes" not in found:  # Pillow leaves 16 levels, or 2, of that
            assert np.abs(stretched - RAMP8).max() <= 1

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_no_numbers(self, value: float) -> None:
        damaged = RAMP1.copy()
        damaged[5, 5] = value
        for limits in (None, STRETCH):
            for source in (damaged, Image.fromarray(damaged), saved(damaged, "TIFF")):
                with pytest.raises(ImageError, match="not finite"):
                    load_image(source, SIZE, limits)

    @pytest.mark.parametrize("value", [0, 700, 65535])
    def test_one_shade_has_nothing_to_lose(self, value: int) -> None:
        assert (seen(np.full((SIZE, SIZE), value, np.uint16)) == value >> 8).all()

    def test_other_types(self) -> None:
        assert np.array_equal(seen(RAMP8 > 100), np.where(RAMP8 > 100, 255, 0))
        for dtype in (complex, object, "U3", "datetime64[s]"):
            with pytest.raises(ImageError, match="expected uint8, uint16, or floats from 0 to 1"):
                load_image(np.zeros((4, 4), dtype), SIZE)
        with pytest.raises(ImageError, match="int32 with alpha, whose range is unknown"):
            load_image(np.zeros((4, 4, 4), np.int32), SIZE, STRETCH)

    def test_tiff_of_12_bits(self) -> None:
        values = [value * 16 + 15 for value in RAMP8.reshape(-1).tolist()]
        packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
        data = tagged(saved(RAMP16, "TIFF"), 258, 12)
        at = struct.unpack("<I", data[data.find(struct.pack("<HHI", 273, 4, 1)) + 8 :][:4])[0]
        data = tagged(data[:at] + packed + data[at + len(packed) :], 279, len(packed))
        assert np.array_equal(seen(data), RAMP8)

    def test_white_is_zero(self) -> None:
        assert np.array_equal(
            seen(tagged(saved(RAMP16, "TIFF"), TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)), 255 - RAMP8
        )

    def test_larger_than_a_strip(self) -> None:
        tall = np.zeros((3000, 500), np.uint16)
        tall[-1] = 65535
        assert load_image(tall, SIZE).original.getpixel((499, 2999)) == (255, 255, 255)
        assert load_image(Image.fromarray(tall), SIZE).original.getpixel((499, 2999)) == (255, 255, 255)
