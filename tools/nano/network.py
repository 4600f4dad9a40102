"""The Qwen-VL architecture in plain torch for training, with the published parameter names, and its probe.

Nothing of `Nano` is outside the architecture. `Probe` reads out intermediate outputs for the auxiliary losses and is
thrown away after training. The runtime's own forward pass shares no code with this one; the exported checkpoint
must give the same logits in both (tests/model).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig, VisionConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Explicit attention: at these sizes torch's fused CPU kernel takes twice as long, forward and backward."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ v
    return out


class _Normalize(torch.autograd.Function):
    """x / rms(x), and its gradient in a few operations: autograd's own chain of them is a tenth of a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y = x.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        out = (y * scale).to(x.dtype)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        along = (grad * out).mean(-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(grad, out, along.to(grad.dtype), value=-1) * scale.to(grad.dtype), None


class _Rotate(torch.autograd.Function):
    """Rotary embedding; its gradient is the rotation back, where autograd would pad and add halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin [R, 1, T, d / 2]; channels j and j + d / 2 turn together."""
    a, b = x.chunk(2, -1)
    return torch.cat([(a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)], -1)


class RMSNorm(nn.Module):
    """Root mean square normalization over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., dim] to the same shape."""
        out: Tensor = _Normalize.apply(x, self.eps) * self.weight  # type: ignore[no-untyped-call]
        return out


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


class Attention(nn.Module):
    """Causal attention of the decoder with rotary embeddings."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.kv_channels
        self.c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.c_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: list[Tensor] | None) -> Tensor:
        """x [B, T, hidden] to the same shape; `past`, keys and values so far, is extended in place."""
        b, n, w = x.shape
        q, k, v = (t.view(b, n, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(w, -1))
        q, k = (_Rotate.apply(t, cos, sin) for t in (q, k))  # type: ignore[no-untyped-call]
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        out: Tensor = self.c_proj(attend(q, k, v, mask).transpose(1, 2).reshape(b, n, w))
        return out


class Mlp(nn.Module):
    """The decoder's gated MLP (SwiGLU)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.ffn_width, bias=False)
        self.w2 = nn.Linear(c.hidden_size, c.ffn_width, bias=False)
        self.c_proj = nn.Linear(c.ffn_width, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., hidden] to the same shape."""
        out: Tensor = self.c_proj(self.w1(x) * F.silu(self.w2(x)))
        return out


class Block(nn.Module):
    """A pre-norm block of the decoder."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (RMSNorm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))
        self.attn, self.mlp = Attention(c), Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x [B, T, hidden] to the same shape."""
        x = x + self.attn(self.ln_1(x), cos, sin, mask, past)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Nano(nn.Module):
    """Qwen-VL at a tiny size, with the published parameter names."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.vocab_size, c.hidden_size),
                "visual": Visual(c.visual),
                "h": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
                "ln_f": RMSNorm(c.hidden_size, c.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.angles = torch.arange(c.seq_length)[:, None] / c.rotary_emb_base ** (
            torch.arange(0, c.kv_channels, 2) / c.kv_channels
        )
        self._initialize()

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding, [vocab_size, hidden_size]."""
        return cast("nn.Embedding", self.transformer["wte"])

    @property
    def visual(self) -> Visual:
        """The vision encoder with its resampler."""
        return cast("Visual", self.transformer["visual"])

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks in order."""
        return cast("nn.ModuleList", self.transformer["h"])

    def _initialize(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() == 2 and name.endswith("weight") and "in_proj_weight" not in name:
                residual = "c_proj" in name or "out_proj" in name
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 if residual else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        visual = self.visual
        nn.init.normal_(self.wte.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(visual.conv1.weight, std=(3 * self.c.visual.patch_size**2) ** -0.5)
        nn.init.normal_(visual.attn_pool.attn.out_proj.weight, std=self.c.hidden_size**-0.5)
        visual.attn_pool.start_local()

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        """ids [R, T], images [P, queries, D]; slots [K, 3]: row, first position, which image. Returns [R, T, D]."""
        h: Tensor = self.wte(ids)
        if len(slots) == 0:
            return h
        rows, starts, which = slots.unbind(1)
        places = starts[:, None] + torch.arange(images.shape[1])
        return h.index_put((rows[:, None].expand_as(places), places), images[which].to(h.dtype))

    def decode(self, h: Tensor, positions: Tensor, mask: Tensor, past: Sequence[list[Tensor]] | None = None) -> Tensor:
        """h [B, T, hidden] through the decoder; positions [B, T], mask added to the scores, `past` one list a block."""
        angles = self.angles[positions].unsqueeze(1)
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for i, block in enumerate(self.blocks):
            h = block(h, cos, sin, mask, None if past is None else past[i])
        out: Tensor = self.transformer["ln_f"](h)
        return out

    def forward(
        self, images: Tensor, ids: Tensor, slots: Tensor, positions: Tensor, segments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed training pass: segment 0 is the shared prefix, k the k-th dialogue on its own, -1 padding."""
        patches, features = self.visual(images)
        h, n = self.embed(ids, features, slots), ids.shape[1]
        seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        seen &= torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill_(~seen, -1e4)[:, None]
        return self.decode(h, positions, mask), patches, features
