"""Alpha and EXIF orientation: what the original leaves out is said, and read on request."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from qvl_runtime import Engine
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import CHOICES, ImageLimits

from .image_files import (
    RAMP8,
    SIZE,
    ink,
    oriented,
    palette_with_transparency,
    saved,
    seen,
)


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_logged", set())


def on_white() -> np.ndarray:
    expected = np.full((SIZE, SIZE), 255, np.uint8)
    expected[8:24, 8:24] = 0
    return expected


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
