"""Cross-entropy over a large vocabulary, some rows at a time: the logits of all rows never exist together.

The gradient is made in the forward pass, while a chunk's logits are there: softmax minus one, times the head for the
hidden states, and its transpose times the hidden states for the head, if the head is trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qvl_runtime.finetune.functions import wide
from qvl_runtime.finetune.keeping import Predictions, divergences

LOGIT_BYTES = 128 << 20  # of a chunk's logits in float32; softmax overwrites them


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the losses of m rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor | Predictions, rows: int) -> Tensor:
        """hidden [m, D], head [V, D], targets of m rows; returns a scalar, in float32 at least."""
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            logits = (part @ head.t()).to(total.dtype)
            loss, grad = _loss_and_gradient(logits, targets, slice(start, start + rows))
            total += loss
            if grad_hidden is None and grad_head is None:
                continue
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[start : start + rows])
            if grad_head is not None:
                grad_head.addmm_(grad.t(), part)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale the gradients that are there already."""
        made = (None if each is None else each.mul_(grad.to(each.dtype)) for each in ctx.saved_tensors)
        hidden, head = made
        return hidden, head, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor | Predictions, part: slice) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk's logits, and its gradient, which overwrites them."""
    if isinstance(targets, Predictions):
        return divergences(logits, targets.at(part))
    wanted = targets[part]
    log_sum = logits.logsumexp(-1)
    loss = (log_sum - logits.gather(1, wanted[:, None])[:, 0]).sum()
    grad = logits.sub_(log_sum[:, None]).exp_()
    grad[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
    return loss, grad


def cross_entropy_sum(hidden: Tensor, head: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """The summed cross-entropy of hidden [m, D] times head [V, D] against targets int64 [m], as a scalar.

    rows: of a chunk; None: as many as `LOGIT_BYTES` hold. The backward pass may run once.
    """
    return cast("Tensor", _ChunkedLoss.apply(hidden, head, targets, rows or chunk_rows(head)))  # type: ignore[no-untyped-call]


def divergence_sum(hidden: Tensor, head: Tensor, kept: Predictions, rows: int | None = None) -> Tensor:
    """The summed divergence of the predictions of hidden [m, D] times head [V, D] from those kept, as a scalar.

    In nats; `keeping.divergences` has the formula. rows and backward pass: as for `cross_entropy_sum`.
    """
    return cast("Tensor", _ChunkedLoss.apply(hidden, head, kept, rows or chunk_rows(head)))  # type: ignore[no-untyped-call]


def chunk_rows(head: Tensor) -> int:
    """How many rows have `LOGIT_BYTES` of logits."""
    return max(1, LOGIT_BYTES // (4 * head.shape[0]))
