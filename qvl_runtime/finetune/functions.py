"""What the trainable network computes with: attention, and norm and rotation with gradients of their own.

All of it works in float64, too, where gradients are compared with finite differences.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Scores up to which attention on a CPU is written out as products and a softmax: 32 x 3 x 256 x 256 of them take
# 39 ms, forward and backward, and 69 ms in torch's fused kernel. Beyond it their memory counts.
MOST_EXPLICIT = 1 << 23


class Documents(NamedTuple):
    """One row of several documents: each sees itself alone, causally."""

    bounds: tuple[int, ...]  # documents + 1 token indices, from 0


Visible: TypeAlias = "Tensor | Documents | None"
"""What a query sees: a mask added to the scores, documents in one row, or None for everything."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 where the values are."""
    return torch.promote_types(dtype, torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible = None) -> Tensor:
    """Attention of q over k and v, [B, H, n, d] each: explicit for few scores on a CPU, torch's own kernels else."""
    if q.is_meta:
        return cast("Tensor", _FusedShapes.apply(q, k, v))  # type: ignore[no-untyped-call]
    if isinstance(visible, Documents):
        pairs = zip(visible.bounds, visible.bounds[1:], strict=False)
        return torch.cat([_causal(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in pairs], 2)
    if _is_small(q, k):
        return _explicit(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not _is_small(q, k):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return _explicit(q, k, v, torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf))


def _is_small(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MOST_EXPLICIT


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ v
    return out


class _FusedShapes(torch.autograd.Function):
    """What a fused kernel of attention allocates and keeps, on the meta device: torch would count all scores there."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v, the result, and a float32 of each query are kept."""
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """The three gradients."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Normalize(torch.autograd.Function):
    """x / rms(x), and its gradient in a few operations: autograd's own chain of them is a tenth of a step of nano."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), computed in float32."""
        y = x.to(wide(x.dtype))
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        out = (y * scale).to(x.dtype)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient with respect to x."""
        out, scale = ctx.saved_tensors
        along = (grad * out).mean(-1, keepdim=True, dtype=scale.dtype)
        return torch.addcmul(grad, out, along.to(grad.dtype), value=-1) * scale.to(grad.dtype), None


class Rotate(torch.autograd.Function):
    """Rotary embedding; its gradient is the rotation back, where autograd would pad and add halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x rotated by its positions' angles."""
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient rotated back."""
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, n, d] in float32: channels j and j + r / 2 turn together, those from r on stay.

    cos, sin: float32 [B, 1, n, r / 2].
    """
    turning = 2 * cos.shape[-1]
    a, b = x[..., :turning].to(wide(x.dtype)).chunk(2, -1)
    turned = torch.cat([(a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)], -1).to(x.dtype)
    return turned if turning == x.shape[-1] else torch.cat([turned, x[..., turning:]], -1)


class RMSNorm(nn.Module):
    """Root mean square normalization over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., dim] to the same shape."""
        out: Tensor = Normalize.apply(x, self.eps) * self.weight  # type: ignore[no-untyped-call]
        return out
