"""Images that stand in for the photos of the original, which are not committed: their features are recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qvl_runtime.prompt.images import LoadedImage, load_image


def shown(root: Path, path: str, size: int) -> LoadedImage:
    """The image that a prompt names: the photo if it is there, otherwise a plain one of its own color."""
    return load_image(root / path if (root / path).is_file() else plain(path), size)


def plain(path: str) -> Image.Image:
    """An image of one color, which depends on the path."""
    return Image.new("RGB", (32, 32), tuple(hashlib.sha256(path.encode()).digest()[:3]))


def recorded_features(root: Path, size: int) -> dict[bytes, Tensor]:
    """What the original's vision encoder gave for each photo [queries, D], by the digest of what stands in for it."""
    file = root / "image_features.safetensors"
    return {shown(root, path, size).digest: t for path, t in load_file(file).items()} if file.is_file() else {}
