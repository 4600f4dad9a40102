"""The visual tower against what the original computes, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qvl_runtime.model.vision import resize_table
from qvl_runtime.prompt.images import load_image, to_pixels
from tests.model.oracle import TOWER, Oracle, close

pytestmark = pytest.mark.cpu


def test_every_stage(full_golden: Path) -> None:
    want = load_file(full_golden / "vision.safetensors")
    seen: dict[str, Tensor] = {}
    features = Oracle(full_golden, "tiny").model.encode_images(want["a.pixels"][None], seen.__setitem__)
    close(features, want["a.final"], TOWER, "final")
    for name in ("embed_plus_pos", "ln_pre", "block0", "block0.attn", "block1", "attn_pool", "ln_post"):
        close(seen[name], want[f"a.{name}"], TOWER, name)


def test_every_stage_behind_the_patches(committed_golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo's pixels are not committed: what the original's patch projection made of them takes its place."""
    want, tiny = load_file(committed_golden / "vision.safetensors"), Oracle(committed_golden, "tiny")
    tower, size = tiny.model.visual, tiny.config.visual.image_size
    monkeypatch.setattr(tower, "_patch_proj", lambda _: want["a.embed_plus_pos"] - tower._positions)
    seen: dict[str, Tensor] = {}
    seen["final"] = tiny.model.encode_images(torch.zeros(1, 3, size, size), seen.__setitem__)
    for name in ("block0.attn", "block1", "attn_pool", "ln_post"):
        close(seen[name][:, ::8], want[f"a.{name}"], TOWER, name)
    for name in ("embed_plus_pos", "final"):
        close(seen[name], want[f"a.{name}"], TOWER, name)


def test_two_files_in_one_pass(full_golden: Path) -> None:
    golden, tiny = full_golden, Oracle(full_golden, "tiny")
    want = load_file(golden / "vision.safetensors")
    size = tiny.config.visual.image_size
    images = [load_image(golden / "images" / name, size) for name in ("beach.jpg", "city.png")]
    for image, name in zip(images, "ab", strict=True):
        assert (torch.tensor(image.rgb) == want[f"{name}.resized_u8"]).all()
    pixels = torch.cat([to_pixels(image.rgb[None]) for image in images])
    close(pixels[0], want["a.pixels"], 1e-6, "pixels")
    close(tiny.model.encode_images(pixels), want["encode_ab"], TOWER, "both")


@pytest.mark.parametrize("grid", [4, 8, 15, 16, 17, 24, 32, 40])
def test_positional_tables_resize_as_the_original_does(golden: Path, grid: int) -> None:
    want = load_file(golden / "pos_embed.safetensors")
    close(resize_table(want["table"], grid), want[f"to_{grid}x{grid}"], 1e-5, f"to {grid} x {grid}")
