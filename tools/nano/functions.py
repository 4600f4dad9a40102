"""What the training network computes with: attention, and norm and rotation with gradients of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Explicit attention: at these sizes torch's fused CPU kernel takes twice as long, forward and backward."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ v
    return out


class Normalize(torch.autograd.Function):
    """x / rms(x), and its gradient in a few operations: autograd's own chain of them is a tenth of a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), computed in float32."""
        y = x.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        out = (y * scale).to(x.dtype)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient with respect to x."""
        out, scale = ctx.saved_tensors
        along = (grad * out).mean(-1, keepdim=True, dtype=torch.float32)
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
        out: Tensor = Normalize.apply(x, self.eps) * self.weight  # type: ignore[no-untyped-call]
        return out
