"""The vision encoder against the original's results, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.network import Network
from qvl_runtime.model.vision import resize_table
from qvl_runtime.prompt.images import load_image, to_pixels
from qvl_runtime.weights.checkpoint import load_state
from tests.model.oracle import VISION, Oracle, close

pytestmark = pytest.mark.cpu
STAGES = ("embed_plus_pos", "ln_pre", "block0.attn", "block0", "block1", "attn_pool", "ln_post", "final")


def test_every_stage(full_golden: Path) -> None:
    want = load_file(full_golden / "vision.safetensors")
    seen: dict[str, Tensor] = {}
    features = Oracle(full_golden, "tiny").model.encode_images(want["a.pixels"][None], seen.__setitem__)
    close(features, want["a.final"], VISION, "final")
    for name in ("embed_plus_pos", "ln_pre", "block0", "block0.attn", "block1", "attn_pool", "ln_post"):
        close(seen[name], want[f"a.{name}"], VISION, name)


@torch.no_grad()
def plain_stages(golden: Path, rgb: Tensor) -> dict[str, Tensor]:
    """Every stage for images uint8 [P, S, S, 3], by the second implementation in plain torch."""
    config = ModelConfig.from_folder(golden / "tiny")
    network = Network(config)
    network.load_state_dict(load_state(golden / "tiny", config, torch.float32))
    visual, seen = network.visual, dict[str, Tensor]()
    visual.ln_pre.register_forward_pre_hook(lambda _, args: seen.__setitem__("embed_plus_pos", args[0]))
    parts: dict[str, nn.Module] = {"ln_pre": visual.ln_pre, "attn_pool": visual.attn_pool, "ln_post": visual.ln_post}
    for i, block in enumerate(visual.blocks):
        parts |= {f"block{i}": block, f"block{i}.attn": block.get_submodule("attn")}
    for name, part in parts.items():
        part.register_forward_hook(lambda _module, _args, out, name=name: seen.__setitem__(name, out))
    seen["final"] = visual(to_pixels(rgb.numpy()))
    return seen


def test_plain_torch_is_the_original(full_golden: Path) -> None:
    """The second implementation gives the original's stages for the photo, so it can stand in for the original."""
    want = load_file(full_golden / "vision.safetensors")
    found = plain_stages(full_golden, want["a.resized_u8"][None])
    for name in STAGES:
        close(found[name], want[f"a.{name}"], VISION, name)


def test_every_stage_of_a_made_image(golden: Path) -> None:
    """Photos are not committed, nor stages from which they can be rebuilt: plain torch says what is right."""
    tiny = Oracle(golden, "tiny")
    size = tiny.config.visual.image_size
    noise = torch.randint(0, 256, (2, 12, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rgb = noise.repeat_interleave(size // 12, 1).repeat_interleave(size // 12, 2)
    seen: dict[str, Tensor] = {}
    seen["final"] = tiny.model.encode_images(to_pixels(rgb.numpy()), seen.__setitem__)
    want = plain_stages(golden, rgb)
    for name in STAGES:
        close(seen[name], want[name], VISION, name)


def test_last_stages_of_a_photo(golden: Path) -> None:
    """What follows the resampler, from the original's resampler output; rows of both are the same."""
    want, encoder = load_file(golden / "vision.safetensors"), Oracle(golden, "tiny").model.visual
    close(encoder._ln_post(want["a.attn_pool"]), want["a.ln_post"], VISION, "ln_post")
    close(encoder._proj(want["a.ln_post"]), want["a.final"], VISION, "final")


def test_two_files_in_one_pass(full_golden: Path) -> None:
    golden, tiny = full_golden, Oracle(full_golden, "tiny")
    want = load_file(golden / "vision.safetensors")
    size = tiny.config.visual.image_size
    images = [load_image(golden / "images" / name, size) for name in ("beach.jpg", "city.png")]
    for image, name in zip(images, "ab", strict=True):
        assert (torch.tensor(image.rgb) == want[f"{name}.resized_u8"]).all()
    pixels = torch.cat([to_pixels(image.rgb[None]) for image in images])
    close(pixels[0], want["a.pixels"], 1e-6, "pixels")
    close(tiny.model.encode_images(pixels), want["encode_ab"], VISION, "both")


@pytest.mark.parametrize("grid", [4, 8, 15, 16, 17, 24, 32, 40])
def test_positional_tables_resize_as_the_original_does(golden: Path, grid: int) -> None:
    want = load_file(golden / "pos_embed.safetensors")
    close(resize_table(want["table"], grid), want[f"to_{grid}x{grid}"], 1e-5, f"to {grid} x {grid}")
