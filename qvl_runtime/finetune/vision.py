"""The vision encoder and its resampler with gradients, with the published parameter names."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_runtime.config.model import VisionConfig
from qvl_runtime.finetune.functions import attend
from qvl_runtime.finetune.linears import Linear
from qvl_runtime.model.vision import resize_table


class VisualAttention(nn.Module):
    """Multi-head attention of the vision encoder, without a mask."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.in_proj, self.out_proj = Linear(c.width, 3 * c.width), Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, patches, width] to the same shape; the projection holds q, k, v of each head in turn."""
        b, n, w = x.shape
        q, k, v = self.in_proj(x).view(b, n, self.heads, 3, w // self.heads).permute(3, 0, 2, 1, 4)
        out: Tensor = self.out_proj(attend(q, k, v).transpose(1, 2).reshape(b, n, w))
        return out


class VisualBlock(nn.Module):
    """A pre-norm transformer block of the vision encoder."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.width, eps=c.layer_norm_eps) for _ in range(2))
        self.attn = VisualAttention(c)
        self.mlp = nn.ModuleDict({"c_fc": Linear(c.width, c.mlp_width), "c_proj": Linear(c.mlp_width, c.width)})

    def forward(self, x: Tensor) -> Tensor:
        """x [P, patches, width] to the same shape."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return out


class ResamplerAttention(nn.Module):
    """The parameters of the resampler's cross-attention, named as in `nn.MultiheadAttention`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)


class Resampler(nn.Module):
    """Cross-attention that compresses the patches of an image into a fixed number of image tokens."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        d = c.output_dim
        self.heads, self.head_dim, self.grid = c.pool_heads, c.pool_head_dim, c.grid
        self.query = nn.Parameter(torch.empty(c.n_queries, d))
        self.pos_embed = nn.Parameter(torch.empty(c.n_queries, d), requires_grad=False)
        self.kv_proj = Linear(c.width, d, bias=False) if c.width != d else None
        self.attn = ResamplerAttention(d)
        self.ln_q, self.ln_kv = (nn.LayerNorm(d, eps=c.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [P, patches, width] to [P, queries, output_dim]."""
        b = x.shape[0]
        kv = self.ln_kv(x if self.kv_proj is None else self.kv_proj(x))
        k = kv + resize_table(self.pos_embed, self.grid).to(kv.dtype)
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
        self.checkpointing = False
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(c.positional_rows, c.width))
        self.ln_pre = nn.LayerNorm(c.width, eps=c.layer_norm_eps)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(VisualBlock(c) for _ in range(c.layers))})
        self.attn_pool = Resampler(c)
        self.ln_post = nn.LayerNorm(c.output_dim, eps=c.layer_norm_eps)
        self.proj = nn.Parameter(torch.empty(c.output_dim, c.output_dim))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the ViT in order."""
        return cast("nn.ModuleList", self.transformer["resblocks"])

    @property
    def vit_parameters(self) -> list[nn.Parameter]:
        """What `patches` computes with: everything before the resampler."""
        modules = (self.conv1, self.ln_pre, self.transformer)
        return [self.positional_embedding, *(p for module in modules for p in module.parameters())]

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [P, 3, S, S] to the ViT's output [P, patches, width]."""
        p, grid = self.c.patch_size, self.c.grid
        x = pixels.to(self.conv1.weight.dtype).view(-1, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(x.reshape(-1, grid * grid, 3 * p * p), self.conv1.weight.flatten(1))  # patches are disjoint
        x = self.ln_pre(x + resize_table(self.positional_embedding, grid).to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and x.requires_grad else block(x)
        out: Tensor = x
        return out

    def pool(self, x: Tensor) -> Tensor:
        """The ViT's output [P, patches, width] to image tokens [P, queries, output_dim]."""
        out: Tensor = self.ln_post(self.attn_pool(x)) @ self.proj
        return out

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [P, 3, S, S] to image tokens [P, queries, output_dim]."""
        return self.pool(self.patches(pixels))
