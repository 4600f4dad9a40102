"""Keep what a model says: train some conversations towards its own predictions from before training.

The answers of those conversations are no targets. A target is the distribution over the next token that the untrained
weights give (learning without forgetting, Li and Hoiem 2017): its gradient is zero at the start, so that these
conversations pull only when training has moved the model. Of each distribution the likeliest tokens are remembered,
and all others are one outcome together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REMEMBERED = 64  # tokens of a distribution
BYTES = 8 * REMEMBERED + 4  # of a distribution: int32 ids, float32 probabilities, and that of another token


class Predictions(NamedTuple):
    """What m tokens are followed by, in a model's opinion."""

    ids: Tensor  # int32 [m, k], the likeliest
    shares: Tensor  # float32 [m, k], their probabilities
    others: Tensor  # float32 [m, 1], the probability of another one

    def at(self, part: slice) -> Predictions:
        """Those of some rows."""
        return Predictions(*(tensor[part] for tensor in self))

    def to(self, device: torch.device) -> Predictions:
        """The same on a device."""
        return Predictions(*(tensor.to(device) for tensor in self))


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of several predictions, in order."""
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.no_grad()
def predictions(hidden: Tensor, head: Tensor, rows: int) -> Predictions:
    """The predictions of hidden [m, D] times head [V, D], `rows` at a time, on the CPU."""
    found = []
    for part in torch.split(hidden, rows):
        shares = (part @ head.t()).float().softmax(-1)
        top = shares.topk(min(REMEMBERED, shares.shape[-1]))
        others = shares.scatter_(1, top.indices, 0.0).sum(-1, keepdim=True)
        found.append(Predictions(top.indices.int(), top.values, others).to(torch.device("cpu")))
    return joined(found)


def divergences(logits: Tensor, kept: Predictions) -> tuple[Tensor, Tensor]:
    """The summed Kullback-Leibler divergence of kept predictions p from those of logits [m, V], and its gradient.

    The sum of p (log p - log q) over the remembered tokens and the outcome "another one". The gradient is q - p for a
    remembered token, and q (1 - p' / q') for another, with p' and q' the probabilities of "another one". It overwrites
    the logits.
    """
    ids, p, other_p = kept.ids.long(), kept.shares.to(logits.dtype), kept.others.to(logits.dtype)
    q = logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()
    own_q = q.gather(1, ids)
    other_q = q.scatter_(1, ids, 0.0).sum(-1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny
    loss = sum(_divergence(*pair, tiny) for pair in ((p, own_q), (other_p, other_q)))
    grad = q.mul_(1 - other_p / other_q.clamp_min(tiny)).scatter_(1, ids, own_q - p)
    return torch.as_tensor(loss), grad


def _divergence(p: Tensor, q: Tensor, tiny: float) -> Tensor:
    return (p * (p.clamp_min(tiny) / q.clamp_min(tiny)).log()).sum()
