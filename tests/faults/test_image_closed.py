"""PIL images whose file was closed, or is gone, before they were decoded."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.images import load_image

from .image_files import (
    RAMP8,
    SIZE,
    saved,
    seen,
)


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
