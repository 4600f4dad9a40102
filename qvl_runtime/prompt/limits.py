"""Limits on the images of a prompt: bytes, pixels, seconds, number, where they may come from, and how they are read."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

from qvl_runtime.errors import ConfigError, ImageError, quoted
from qvl_runtime.prompt.hosts import is_pattern

CAN_ISOLATE = os.name == "posix" and not getattr(sys, "frozen", False)
"""Whether worker processes can be started here. A frozen program would start itself again, not Python."""

CHOICES = {
    "transparency": ("drop", "white"),
    "exif_orientation": ("ignore", "apply"),
    "deep_pixels": ("range", "stretch"),
}
"""The values of the options that say how an image is read; the first is the default."""

LARGEST_LIMIT = 2**40  # bytes or pixels; 1 TiB is beyond any machine, and sizes near 2^63 overflow in system calls
LARGEST_TIMEOUT_S = 10**9  # seconds, 31 years: above 9.2e9, Python's timeouts overflow


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on what loading the images of one prompt may cost, and how they are read, under the engine's option names.

    Raises `ConfigError` for a value out of range.
    """

    max_image_bytes: int = 20 * 2**20  # of the encoded file
    max_image_pixels: int = 2**26  # width x height of the original, from its header; phones take up to 64 million
    max_image_side: int = 65_535  # pixels; resizing a longer side takes seconds and gigabytes, however narrow it is
    max_request_pixels: int = 2**28  # of all images of a prompt, which are decoded one after another
    image_timeout_s: float = 10.0  # seconds for an image: its download, and its decoding if images are isolated
    isolate_images: bool = False  # decode files in worker processes, limited in time and memory
    max_images: int = 16  # a prompt
    allow_urls: bool | tuple[str, ...] = True  # http(s): any host, none, or those named; "*.example.com": subdomains
    allow_private_addresses: bool = False  # of hosts, redirects included: loopback, inside a network, link-local
    allow_files: bool = True
    transparency: str = "drop"  # the alpha channel: "drop" as the original does, or put the image on "white"
    exif_orientation: str = "ignore"  # "ignore" as the original does, or "apply" as viewers do; boxes follow
    deep_pixels: str = "range"  # above 8 bits: white is the type's "range", or "stretch" from darkest to brightest

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels", "max_image_side", "max_request_pixels", "image_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {quoted(getattr(self, name))}; expected a positive number")
            most = LARGEST_TIMEOUT_S if name == "image_timeout_s" else LARGEST_LIMIT
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {quoted(getattr(self, name))}; expected at most {most:,}")
        if self.max_images < 0:
            raise ConfigError(f"max_images is {self.max_images}; expected 0 (no images) or more")
        for name in ("isolate_images", "allow_private_addresses", "allow_files"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {quoted(getattr(self, name))}; expected True or False")
        if self.isolate_images and not CAN_ISOLATE:
            raise ConfigError(
                "isolate_images is True, which needs a POSIX system and a Python that is not frozen: leave it out"
            )
        if not isinstance(self.allow_urls, bool):
            hosts = self.allow_urls if isinstance(self.allow_urls, (tuple, list)) else (self.allow_urls,)
            if hosts is not self.allow_urls or not all(map(is_pattern, hosts)):
                wrong = next((host for host in hosts if not is_pattern(host)), self.allow_urls)
                raise ConfigError(f"allow_urls has {quoted(wrong)}; expected True, False or a tuple of host names")
        for name, choices in CHOICES.items():
            if not isinstance(value := getattr(self, name), str) or value not in choices:
                raise ConfigError(f"{name} is {quoted(value)}; supported are {' and '.join(map(repr, choices))}")

    def check_bytes(self, size: int, described: str) -> None:
        """Raise `ImageError` if an encoded image has more bytes than allowed; `described` names it."""
        if size > self.max_image_bytes:
            raise ImageError(
                f"{described} has {size:,} bytes, over the limit of {self.max_image_bytes:,}: "
                "shrink it or raise max_image_bytes"
            )

    def check_pixels(self, width: int, height: int, described: str) -> None:
        """Raise `ImageError` if an image has more pixels than allowed, or none; `described` names it."""
        if width * height > self.max_image_pixels:
            raise ImageError(
                f"{described} is {width} x {height}, over the limit of {self.max_image_pixels:,} pixels: "
                "shrink it or raise max_image_pixels"
            )
        if max(width, height) > self.max_image_side:
            raise ImageError(
                f"{described} is {width} x {height}, over the limit of {self.max_image_side:,} pixels a side: "
                "cut it into parts or raise max_image_side"
            )
        if width * height <= 0:
            raise ImageError(f"{described} is {width} x {height}: it has no pixels")
