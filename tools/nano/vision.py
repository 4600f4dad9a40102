"""The vision encoder and its resampler in plain torch for training, with the published parameter names."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_runtime.config.model import VisionConfig
from tools.nano.functions import attend

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisualAttention(nn.Module):
    """Multi-head attention of the vision encoder, without a mask."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.in_proj, self.out_proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, patches, width] to the same shape."""
        b, n, w = x.shape
        q, k, v = self.in_proj(x).view(b, n, self.heads, 3, w // self.heads).permute(3, 0, 2, 1, 4)
        out: Tensor = self.out_proj(attend(q, k, v).transpose(1, 2).reshape(b, n, w))
        return out


class VisualBlock(nn.Module):
    """A pre-norm transformer block of the vision encoder."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c.width, eps=1e-6), nn.LayerNorm(c.width, eps=1e-6)
        self.attn = VisualAttention(c)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(c.width, c.mlp_width), "c_proj": nn.Linear(c.mlp_width, c.width)})

    def forward(self, x: Tensor) -> Tensor:
        """x [B, patches, width] to the same shape."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return out


def sincos(side: int, dim: int) -> Tensor:
    """[side * side, dim]: the first half tells the column, the second the row, each sines then cosines."""
    waves = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * waves
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    column, row = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).reshape(side * side, dim).float()


def resized(table: Tensor, grid: int) -> Tensor:
    """Resize position embeddings [side * side, dim] to [grid * grid, dim], bicubically."""
    side = math.isqrt(table.shape[0])
    if side == grid:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)


class ResamplerAttention(nn.Module):
    """The parameters of the resampler's cross-attention, named as in `nn.MultiheadAttention`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)


class Resampler(nn.Module):
    """Cross-attention that compresses the patches of an image into a fixed number of image tokens."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        d = c.output_dim
        self.heads, self.head_dim, self.grid = c.pool_heads, c.pool_head_dim, c.grid
        self.query = nn.Parameter(torch.randn(c.n_queries, d) * 0.02)
        self.pos_embed = nn.Parameter(sincos(math.isqrt(c.n_queries), d), requires_grad=False)
        self.kv_proj = nn.Linear(c.width, d, bias=False)
        self.attn = ResamplerAttention(d)
        self.ln_q, self.ln_kv = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)

    def start_local(self, gain: float = 6.0) -> None:
        """Let every query begin by looking at its own place.

        W_q and W_k of each head pick the fastest position waves of both axes (the stock order of channels would give
        whole heads a single axis), so q·k peaks where the positions agree.
        """
        d, waves = self.query.shape[1], self.head_dim // 4
        sines = torch.cat([torch.arange(waves), d // 4 + torch.arange(waves)])
        chosen = torch.cat([sines, d // 2 + sines])
        select = torch.zeros(self.head_dim, d)
        select[torch.arange(self.head_dim), chosen] = 1.0
        with torch.no_grad():
            weight = self.attn.in_proj_weight
            weight[: 2 * d] *= 0.1
            for start in range(0, 2 * d, self.head_dim):
                weight[start : start + self.head_dim] += math.sqrt(gain) * select
            self.ln_q.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, patches, width] to [B, queries, output_dim]."""
        b = x.shape[0]
        kv = self.ln_kv(self.kv_proj(x))
        k = kv + resized(self.pos_embed, self.grid).to(kv.dtype)
        q = (self.ln_q(self.query) + self.pos_embed).to(kv.dtype)[None].expand(b, -1, -1)
        parts = zip((q, k, kv), self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(t, w, bias).view(b, -1, self.heads, self.head_dim).transpose(1, 2) for t, w, bias in parts)
        out: Tensor = self.attn.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Visual(nn.Module):
    """The vision encoder: patch embedding, blocks, resampler and projection."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.c = c
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(c.positional_rows, c.width) * 0.1)
        self.ln_pre = nn.LayerNorm(c.width, eps=1e-6)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(VisualBlock(c) for _ in range(c.layers))})
        self.attn_pool = Resampler(c)
        self.ln_post = nn.LayerNorm(c.output_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(c.output_dim, c.output_dim) * c.output_dim**-0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, S, S, 3] to patches [B, L, width] (for the probe) and image tokens [B, queries, hidden]."""
        p, grid = self.c.patch_size, self.c.grid
        x = (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        x = x.to(self.conv1.weight.dtype).view(-1, grid, p, grid, p, 3).permute(0, 1, 3, 5, 2, 4)
        x = F.linear(x.reshape(-1, grid * grid, 3 * p * p), self.conv1.weight.flatten(1))  # patches are disjoint
        x = self.ln_pre(x + resized(self.positional_embedding, grid).to(x.dtype))
        for block in cast("nn.ModuleList", self.transformer["resblocks"]):
            x = block(x)
        return x, self.ln_post(self.attn_pool(x)) @ self.proj
