"""Images whose pixels PIL's `convert("RGB")` would lose: more than 8 bits, alpha, EXIF orientation, a closed file."""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from qvl_runtime import Engine
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.errors import ConfigError, ImageError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import CHOICES, ImageLimits

SIZE = 32
RAMP8 = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE).astype(np.uint8)  # every value, four times
RAMP16 = RAMP8.astype(np.uint16) * 257
RAMP1 = (RAMP8 / 255).astype(np.float32)
STRETCH = ImageLimits(deep_pixels="stretch")


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_logged", set())


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


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


def ink(mode: str) -> Image.Image:
    """A black square on transparent black: all of it is in the alpha channel."""
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 8, 24, 24))
    if mode in ("La", "RGBa"):
        return image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    return image.convert(mode)


def on_white() -> np.ndarray:
    expected = np.full((SIZE, SIZE), 255, np.uint8)
    expected[8:24, 8:24] = 0
    return expected


def palette_with_transparency() -> bytes:
    indices = np.zeros((SIZE, SIZE), np.uint8)
    indices[8:24, 8:24] = 1
    image = Image.new("P", (SIZE, SIZE))
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette([0, 0, 0, 0, 0, 0] + [9] * 762)
    return saved(image, "PNG", transparency=bytes([0, 255]))


class TestTransparency:
    """Qwen3-VL#661, hermes-agent#64677, DIGITS#85."""

    SOURCES: ClassVar = [
        ink("RGBA"),
        ink("LA"),
        ink("PA"),
        ink("La"),
        ink("RGBa"),
        np.asarray(ink("RGBA")),
        np.asarray(ink("RGBA")).astype(np.uint16) * 257,
        (np.asarray(ink("RGBA")) / 255).astype(np.float32),
        saved(ink("RGBA"), "PNG"),
        saved(ink("LA"), "PNG"),
        saved(ink("RGBA"), "WEBP", lossless=True, exact=True),
        saved(ink("RGBA"), "TIFF"),
        palette_with_transparency(),
        saved(Image.new("L", (SIZE, SIZE)), "PNG", transparency=0),
        saved(ink("RGBA"), "GIF"),
        saved(ink("RGBA"), "PNG", save_all=True, append_images=[Image.new("RGBA", (SIZE, SIZE))]),  # animated
    ]

    @pytest.mark.parametrize("source", SOURCES, ids=lambda source: images.describe(source))
    def test_dropped_with_one_warning(self, source: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                load_image(source, SIZE)
        (record,) = caplog.records
        assert images.describe(source) in record.getMessage()
        assert "set transparency to 'white'" in record.getMessage()

    @pytest.mark.parametrize("source", SOURCES[:-3] + SOURCES[-2:], ids=lambda source: images.describe(source))
    def test_put_on_white(self, source: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(seen(source, ImageLimits(transparency="white")), on_white())
        assert not caplog.records

    def test_half_transparent_ink_is_mixed(self) -> None:
        half = np.zeros((SIZE, SIZE, 4), np.uint8)
        half[..., 3] = 51
        assert (seen(half, ImageLimits(transparency="white")) == 204).all()

    @pytest.mark.parametrize(
        "image",
        [
            Image.new("RGBA", (SIZE, SIZE), (10, 20, 30, 255)),  # opaque
            Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0)),  # white below
            Image.new("RGBA", (SIZE, SIZE), (250, 250, 250, 128)),
            Image.new("RGB", (SIZE, SIZE)),
        ],
    )
    def test_nothing_hidden_nothing_said(self, image: Image.Image, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            load_image(image, SIZE)
        assert not caplog.records


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pattern = np.dstack([np.repeat(RAMP8[:12], 2, axis=0)] * 3)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    return saved(pattern, kind, exif=exif, **lossless)


class TestOrientation:
    """sglang#33449, ollama#18418, mistral-common#330, llama.cpp#24196."""

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_applied_on_request(self, kind: str, orientation: int, caplog: pytest.LogCaptureFixture) -> None:
        from PIL import ImageOps

        data = oriented(kind, orientation)
        with Image.open(io.BytesIO(data)) as image:
            stored, turned = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
        with caplog.at_level(logging.WARNING):
            applied = load_image(data, SIZE, ImageLimits(exif_orientation="apply"))
            assert not caplog.records
            assert np.array_equal(np.asarray(applied.original), np.asarray(turned))
            assert (applied.width, applied.height) == turned.size
            for _ in range(2):
                assert np.array_equal(np.asarray(load_image(data, SIZE).original), np.asarray(stored))
        assert len(caplog.records) == (orientation != 1)
        assert orientation == 1 or "set exif_orientation to 'apply'" in caplog.text

    def test_of_a_pil_image_and_an_open_file(self) -> None:
        data, limits = oriented("JPEG", 6), ImageLimits(exif_orientation="apply")
        expected = load_image(data, SIZE, limits)
        assert expected.height == 32 and expected.width == 24
        for source in (Image.open(io.BytesIO(data)), io.BytesIO(data)):
            assert load_image(source, SIZE, limits).digest == expected.digest

    @pytest.mark.parametrize("orientation", [0, 9, 77])
    def test_an_unknown_orientation_is_none(self, orientation: int) -> None:
        for value in ("apply", "ignore"):
            limits = ImageLimits(exif_orientation=value)
            assert load_image(oriented("JPEG", orientation), SIZE, limits).width == 32

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_metadata_costs_nothing(self) -> None:
        data = bytearray(oriented("JPEG", 6))
        at = data.find(b"Exif\0\0") + 6
        data[at : at + 8] = b"MM\0*\xff\xff\xff\xff"
        assert load_image(bytes(data), SIZE, ImageLimits(exif_orientation="apply")).width == 32


@pytest.mark.cpu
def test_boxes_are_of_the_turned_image() -> None:
    options: Any = {"transparency": "white", "exif_orientation": "apply", "deep_pixels": "stretch"}
    engine = Engine(device="cpu", kv_cache_bytes=2**22, **options)
    message = {"role": "user", "content": [{"image": oriented("JPEG", 6)}, {"text": "Box the square"}]}
    completion = engine.chat([message])
    assert completion.draw().size == (24, 32)
    assert engine.encode([{"image": RAMP8.astype(np.uint16)}]).prompt.spans[0].image.rgb.max() == 255


@pytest.mark.parametrize("name", ["transparency", "exif_orientation", "deep_pixels"])
def test_options_are_checked(name: str) -> None:
    for options in (ImageLimits, EngineConfig):
        with pytest.raises(ConfigError, match=f"{name} is 'x'; supported are "):
            options(**{name: "x"})


class TestClosedFiles:
    """qapyq#28, keras-preprocessing#261, PixPro#12."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        Image.fromarray(np.dstack([RAMP8] * 3)).save(tmp_path / "a.png")
        return tmp_path / "a.png"

    @staticmethod
    def sources(path: Path) -> Iterator[Image.Image]:
        with Image.open(path) as image:
            pass
        yield image
        with path.open("rb") as file:
            image = Image.open(file)
        yield image
        memory = io.BytesIO(path.read_bytes())
        image = Image.open(memory)
        memory.close()
        yield image
        image = Image.open(path)
        image.close()
        yield image
        image = Image.new("RGB", (4, 4))
        image.close()
        yield image
        for kind in ("GIF", "WEBP", "TIFF", "BMP", "JPEG", "PPM"):
            memory = io.BytesIO(saved(RAMP8, kind))
            with Image.open(memory) as image:
                pass
            memory.close()
            if kind != "WEBP":  # whose decoder has read the file
                yield image

    def test_the_cause_is_named(self, path: Path) -> None:
        for image in self.sources(path):
            with pytest.raises(ImageError, match=r"was closed before it was decoded: call image\.load\(\)"):
                load_image(image, SIZE)

    def test_loaded_in_time(self, path: Path) -> None:
        with Image.open(path) as image:
            image.load()
        assert np.array_equal(seen(image), RAMP8)

    def test_the_file_is_gone(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP8).save(tmp_path / "a.bmp")
        image = Image.open(tmp_path / "a.bmp")  # PIL maps it when it is loaded, by its name
        (tmp_path / "a.bmp").unlink()
        try:
            loaded = seen(image)
        except ImageError as error:
            assert "a file that is gone" in str(error)
        else:
            assert np.array_equal(loaded, RAMP8)

    @pytest.mark.parametrize("fault", [RuntimeError("no decoder"), KeyError(3), AssertionError(), OverflowError("x")])
    def test_any_plugin(self, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        image = Image.open(io.BytesIO(saved(RAMP8, "PNG")))

        def load() -> None:
            raise fault

        monkeypatch.setattr(image, "load", load)
        with pytest.raises(ImageError, match="is damaged"):
            load_image(image, SIZE)

    def test_shared_by_threads(self) -> None:
        image, digests = Image.open(io.BytesIO(saved(np.kron(RAMP8, np.ones((30, 30), np.uint8)), "PNG"))), []

        def work() -> None:
            digests.append(load_image(image, SIZE).digest)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(digests) == 8 and len(set(digests)) == 1


@pytest.mark.cpu
def test_options_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from qvl_runtime.cli import options
    from qvl_runtime.cli.app import app

    opened: list[dict[str, Any]] = []
    real = options.EngineOptions.open

    def open_and_note(self: options.EngineOptions) -> Engine:
        engine = real(self)
        opened.append({name: getattr(engine.engine_config, name) for name in CHOICES})
        return engine

    monkeypatch.setattr(options.EngineOptions, "open", open_and_note)
    ink("RGBA").save(tmp_path / "a.png")
    flags = ["--transparency", "white", "--exif-orientation", "apply", "--deep-pixels", "stretch"]
    arguments = ["generate", "hi", "-i", str(tmp_path / "a.png"), "--max-tokens", "1", "--temperature", "0", "-q"]
    result = CliRunner().invoke(app, [*arguments, *flags])
    assert result.exit_code == 0, result.output
    assert opened == [{"transparency": "white", "exif_orientation": "apply", "deep_pixels": "stretch"}]
    help_text = CliRunner().invoke(app, ["chat", "--help"]).output
    assert all(flag in help_text for flag in flags[::2])
