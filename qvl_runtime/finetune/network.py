"""The trainable network: the Qwen-VL architecture in plain torch, with the published parameter names.

The runtime's own forward pass shares no code with it but the rotary frequencies; both must give the same logits
(tests/model, tests/finetune). As in the original, neither log-n scaling nor dynamic NTK is active in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.functions import RMSNorm, Rotate, Visible, attend, wide
from qvl_runtime.finetune.keeping import Predictions, predictions
from qvl_runtime.finetune.linears import Adaptable, Embedding, Linear
from qvl_runtime.finetune.loss import chunk_rows, cross_entropy_sum, divergence_sum
from qvl_runtime.finetune.vision import Visual
from qvl_runtime.model.rotary import inverse_frequencies


class Targets(NamedTuple):
    """What one row teaches."""

    predicting: Tensor  # int64 [m], the tokens whose successor is learned
    ids: Tensor  # int64 [m], those successors


class Kept(NamedTuple):
    """What one row must not change."""

    predicting: Tensor  # int64 [m], tokens whose successor is predicted as before
    predictions: Predictions  # of these m tokens


class Losses(NamedTuple):
    """The sums over one row; scalars."""

    learned: Tensor  # cross-entropy of the targets
    kept: Tensor  # divergence from what is kept


class Attention(nn.Module):
    """Causal attention of the decoder with rotary embeddings."""

    c_attn: Adaptable
    c_proj: Adaptable

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.kv_channels
        self.c_attn = Linear(c.hidden_size, 3 * c.hidden_size)
        self.c_proj = Linear(c.hidden_size, c.hidden_size, bias=not c.no_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, past: list[Tensor] | None) -> Tensor:
        """x [B, n, hidden] to the same shape; `past`, keys and values so far, is extended in place."""
        b, n, w = x.shape
        q, k, v = (t.view(b, n, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(w, -1))
        q, k = (Rotate.apply(t, cos, sin) for t in (q, k))  # type: ignore[no-untyped-call]
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        out: Tensor = self.c_proj(attend(q, k, v, visible).transpose(1, 2).reshape(b, n, w))
        return out


class Mlp(nn.Module):
    """The decoder's gated MLP (SwiGLU)."""

    w1: Adaptable
    w2: Adaptable
    c_proj: Adaptable

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        bias = not c.no_bias
        self.w1, self.w2 = (Linear(c.hidden_size, c.ffn_width, bias) for _ in range(2))
        self.up_gate: Adaptable | None = None  # the two merged, where a packed checkpoint has them so
        self.c_proj = Linear(c.ffn_width, c.hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., hidden] to the same shape."""
        if self.up_gate is None:
            up, gate = self.w1(x), self.w2(x)
        else:
            up, gate = self.up_gate(x).chunk(2, -1)
            up, gate = self.w1.add(x, up), self.w2.add(x, gate)
        out: Tensor = self.c_proj(up * F.silu(gate))
        return out


class Block(nn.Module):
    """A pre-norm block of the decoder."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (RMSNorm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))
        self.attn, self.mlp = Attention(c), Mlp(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, past: list[Tensor] | None = None
    ) -> Tensor:
        """x [B, n, hidden] to the same shape."""
        x = x + self.attn(self.ln_1(x), cos, sin, visible, past)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Network(nn.Module):
    """Qwen-VL with gradients. On torch's meta device it costs no memory until weights are assigned."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.checkpointing = False  # recompute each block's activations in the backward pass
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(c.vocab_size, c.hidden_size),
                "visual": Visual(c.visual),
                "h": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
                "ln_f": RMSNorm(c.hidden_size, c.layer_norm_epsilon),
            }
        )
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def wte(self) -> Embedding:
        """The token embedding, [vocab_size, hidden_size]."""
        return cast("Embedding", self.transformer["wte"])

    @property
    def visual(self) -> Visual:
        """The vision encoder with its resampler."""
        return cast("Visual", self.transformer["visual"])

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks in order."""
        return cast("nn.ModuleList", self.transformer["h"])

    @property
    def head(self) -> Tensor:
        """The head's weight, [vocab_size, hidden_size]."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, ids: Tensor, images: Tensor, slots: Tensor) -> Tensor:
        """ids [B, n], images [P, queries, D]; slots [K, 3]: row, first position, which image. Returns [B, n, D]."""
        h: Tensor = self.wte(ids)
        if len(slots) == 0:
            return h
        rows, starts, which = slots.unbind(1)
        places = starts[:, None] + torch.arange(images.shape[1], device=starts.device)
        return h.index_put((rows[:, None].expand_as(places), places), images[which].to(h.dtype))

    def decode(
        self, h: Tensor, positions: Tensor, visible: Visible, past: Sequence[list[Tensor]] | None = None
    ) -> Tensor:
        """h [B, n, hidden] through the decoder and ln_f; positions int64 [B, n], `past` one list a block."""
        frequencies = inverse_frequencies(self.c.rotary_emb_base, self.c.rotary_dim, 1.0).to(h.device)
        angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(1).to(wide(h.dtype))
        cos, sin = angles.cos(), angles.sin()
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, visible, use_reentrant=False)
            else:
                h = block(h, cos, sin, visible, None if past is None else past[i])
        out: Tensor = self.transformer["ln_f"](h)
        return out

    def forward(
        self,
        ids: Tensor,
        images: Tensor,
        slots: Tensor,
        positions: Tensor,
        visible: Visible,
        targets: Targets,
        kept: Kept | None = None,
    ) -> Losses:
        """The summed losses of one row: `embed`, `decode`, and what its tokens predict.

        A call of the module, so that what shards its parameters can gather them around it.
        """
        h = self.decode(self.embed(ids, images, slots), positions, visible)[0]
        learned = cross_entropy_sum(h[targets.predicting], self.head, targets.ids)
        if kept is None:
            return Losses(learned, torch.zeros_like(learned))
        return Losses(learned, divergence_sum(h[kept.predicting], self.head, kept.predictions))

    @torch.no_grad()
    def predict(
        self, ids: Tensor, images: Tensor, slots: Tensor, positions: Tensor, visible: Visible, predicting: Tensor
    ) -> Predictions:
        """What follows the tokens `predicting`, int64 [m], of one row, by the weights as they are; on the CPU."""
        h = self.decode(self.embed(ids, images, slots), positions, visible)[0]
        return predictions(h[predicting], self.head, chunk_rows(self.head))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] to logits [.., vocab_size]."""
        return F.linear(hidden, self.head)
