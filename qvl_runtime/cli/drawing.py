"""Write images with boxes drawn on them: what can be checked is checked before a model is loaded."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_runtime.cli.terminal import say
from qvl_runtime.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from qvl_runtime.schedule.api import Completion

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_drawable(path: Path, font: Path | None = None) -> None:
    """Raise `ImageError` if no image can be written to `path`, and `ConfigError` if the font cannot be read."""
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"cannot draw to {path}: its name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ImageError(f"cannot draw to {path}: the folder {path.parent} does not exist: create it first")
    if font is not None:
        from qvl_runtime.prompt.fonts import open_font

        open_font(font, 16)


def save_drawing(completion: Completion, path: Path, font: Path | None = None) -> Path | None:
    """Write the image with the answer's boxes drawn on it; without boxes, print a note and return None."""
    if not completion.boxes:
        say(f"note: the answer has no box, so {path} is not written; ask for one: 'Box the dog', '框出图中的狗'")
        return None
    save_image(completion.draw(font=font), path)
    return path


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all: a full disk leaves what was there before. Raises `OSError`."""
    from PIL import Image

    Image.init()
    encoded = io.BytesIO()
    image.save(encoded, Image.EXTENSION[path.suffix.lower()])
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_bytes(encoded.getvalue())
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(encoded.getvalue())
        partial.replace(path.resolve())  # of a link, what it points to
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
