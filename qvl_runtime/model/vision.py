"""The vision encoder: patches, a ViT, and the resampler that turns an image into a fixed number of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_runtime.config.model import VisionConfig
from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.linear import Linear, LinearBuilder


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """A LayerNorm with weight and bias [W]."""

    ops: Ops
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize x [.., W] over its last dimension."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class VisionBlock:
    """One block of the ViT: attention and an MLP, each behind a LayerNorm."""

    ops: Ops
    heads: int
    ln_1: LayerNorm
    ln_2: LayerNorm
    in_proj: Linear
    out_proj: Linear
    c_fc: Linear
    c_proj: Linear

    def __call__(self, x: Tensor, observe: Observer) -> Tensor:
        """Map the residual stream x [P, L, W] to the residual stream after this block."""
        attended = self.out_proj(self.ops.vision_attention(self.in_proj(self.ln_1(x)), self.heads))
        observe("attn", attended)
        x, normed = self.ops.add_layer_norm(x, attended, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        return x + self.c_proj(self.ops.gelu(self.c_fc(normed)))


class Resampler:
    """One cross attention from learned queries to the patches, with positions on queries and keys (§4.5)."""

    def __init__(self, config: VisionConfig, linears: LinearBuilder, name: str) -> None:
        self._ops, self._heads = linears.ops, config.pool_heads
        self._kv_proj = linears.dense(f"{name}.kv_proj") if config.width != config.output_dim else None
        self._ln_kv = _norm(config, linears, f"{name}.ln_kv")
        weights, biases = (linears.state.pop(f"{name}.attn.in_proj_{kind}").chunk(3) for kind in ("weight", "bias"))
        self._to_k = linears.of_tensors(f"{name}.attn.to_k", weights[1], biases[1])
        self._to_v = linears.of_tensors(f"{name}.attn.to_v", weights[2], biases[2])
        self._out_proj = linears.dense(f"{name}.attn.out_proj")
        positions = linears.state[f"{name}.pos_embed"]
        # the queries are the same for every image: projected once
        queries = _norm(config, linears, f"{name}.ln_q")(linears.state[f"{name}.query"]) + positions
        self._queries = linears.ops.linear(queries, weights[0], biases[0])
        self._key_positions = resize_table(positions, config.grid)

    def __call__(self, x: Tensor) -> Tensor:
        """Map patches [P, L, W] to features [P, queries, output_dim]."""
        kv = self._ln_kv(x if self._kv_proj is None else self._kv_proj(x))
        k, v = self._to_k(kv + self._key_positions), self._to_v(kv)
        return self._out_proj(self._ops.cross_attention(self._queries, k, v, self._heads))


class VisionEncoder:
    """The ViT and the resampler of Qwen-VL."""

    def __init__(self, config: VisionConfig, linears: LinearBuilder) -> None:
        root = "transformer.visual"
        self.config = config
        # the kernel is as large as the stride, so the convolution is a linear of flattened patches
        self._patch_proj = linears.of_tensors(f"{root}.conv1", linears.state.pop(f"{root}.conv1.weight").flatten(1))
        self._positions = resize_table(linears.state[f"{root}.positional_embedding"], config.grid)
        self._ln_pre = _norm(config, linears, f"{root}.ln_pre")
        blocks = (f"{root}.transformer.resblocks.{i}" for i in range(config.layers))
        self._blocks = [_block(config, linears, name) for name in blocks]
        self._resampler = Resampler(config, linears, f"{root}.attn_pool")
        self._ln_post = _norm(config, linears, f"{root}.ln_post")
        self._proj = linears.of_tensors(f"{root}.proj", linears.state.pop(f"{root}.proj").t())  # published as [in, out]

    def forward(self, pixels: Tensor, observe: Observer = unobserved) -> Tensor:
        """Map normalized pixels float32 [P, 3, S, S] to features [P, queries, output_dim] in the weights' dtype."""
        x = self._patch_proj(self._patches(pixels.to(self._positions))) + self._positions
        observe("embed_plus_pos", x)
        x = self._ln_pre(x)
        observe("ln_pre", x)
        for i, block in enumerate(self._blocks):
            x = block(x, lambda name, value, i=i: observe(f"block{i}.{name}", value))
            observe(f"block{i}", x)
        x = self._resampler(x)
        observe("attn_pool", x)
        x = self._ln_post(x)
        observe("ln_post", x)
        return self._proj(x)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Cut pixels [P, 3, S, S] into flat patches [P, L, 3 * p * p], row by row of the grid."""
        grid, p = self.config.grid, self.config.patch_size
        cells = pixels.view(-1, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(len(pixels), grid * grid, 3 * p * p)


def resize_table(table: Tensor, grid: int) -> Tensor:
    """Resize a square positional table [s * s, C] to [grid * grid, C]: bicubic, a = -0.75, no antialiasing (§4.2).

    Uses half-pixel centers, clamps indices at the border, and computes in float32 before rounding to the table's dtype.
    """
    side = math.isqrt(len(table))
    if side == grid:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def _norm(config: VisionConfig, linears: LinearBuilder, name: str) -> LayerNorm:
    return LayerNorm(linears.ops, linears.state[f"{name}.weight"], linears.state[f"{name}.bias"], config.layer_norm_eps)


def _block(config: VisionConfig, linears: LinearBuilder, name: str) -> VisionBlock:
    return VisionBlock(
        linears.ops,
        config.heads,
        _norm(config, linears, f"{name}.ln_1"),
        _norm(config, linears, f"{name}.ln_2"),
        linears.dense(f"{name}.attn.in_proj"),
        linears.dense(f"{name}.attn.out_proj"),
        linears.dense(f"{name}.mlp.c_fc"),
        linears.dense(f"{name}.mlp.c_proj"),
    )
