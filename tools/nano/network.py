"""The Qwen-VL architecture in plain torch for training, with the published parameter names, and its probe.

Nothing of `Nano` is outside the architecture. `Probe` reads out intermediate outputs for the auxiliary losses and is
thrown away after training. The runtime's own forward pass shares no code with this one; the exported checkpoint
must give the same logits in both (tests/model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig
from tools.nano.functions import RMSNorm, Rotate, attend
from tools.nano.vision import Visual


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
        q, k = (Rotate.apply(t, cos, sin) for t in (q, k))  # type: ignore[no-untyped-call]
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
