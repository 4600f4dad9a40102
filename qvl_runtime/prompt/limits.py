"""Limits on the images of a prompt: bytes, pixels, seconds, number, and where they may come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qvl_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on what loading the images of one prompt may cost, under the names of the engine's options.

    Raises `ConfigError` for a value out of range.
    """

    max_image_bytes: int = 20 * 2**20  # of the encoded file
    max_image_pixels: int = 40_000_000  # width x height of the original, read from its header before decoding
    image_timeout_s: float = 10.0  # seconds, for one download from name look-up to last byte
    max_images: int = 16  # a prompt
    allow_urls: bool = True
    allow_files: bool = True

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels", "image_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive number")
        if self.max_images < 0:
            raise ConfigError(f"max_images is {self.max_images}; expected 0 (no images) or more")
