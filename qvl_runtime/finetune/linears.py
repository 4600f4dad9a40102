"""The linears of the trainable network, each of which may carry a LoRA side path."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SidePath(nn.Module):
    """y = scale * B(A(dropout(x))): the low-rank update of a linear (Hu et al. 2021, LoRA).

    A starts as kaiming uniform and B at zero, so that training starts from the base model's function.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale, self.dropout = scale, dropout

    def start(self, generator: torch.Generator) -> None:
        """Draw A."""
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], computed in x's dtype whatever that of A and B."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(dropped, self.lora_A.to(x.dtype))
        return F.linear(low, self.lora_B.to(x.dtype)) * self.scale


class Adaptable(nn.Module):
    """A linear of `in_features` and `out_features` that may have a side path."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.adapter: SidePath | None = None

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y, with the side path's part for x added."""
        return y if self.adapter is None else y + self.adapter(x)


class Linear(Adaptable):
    """A dense linear with the published names: weight [out, in] and bias [out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out]."""
        return self.add(x, F.linear(x, self.weight, self.bias))


class Embedding(nn.Module):
    """A table [rows, dim], looked up by ids. Unlike torch's it starts unfilled: filling meta tensors imports dynamo."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [..] to rows [.., dim]."""
        return F.embedding(ids, self.weight)


class Part(Adaptable):
    """A published linear whose weights another module holds, merged with its sibling's: only its side path is here."""

    def forward(self, x: Tensor) -> Tensor:
        """Raise: the module with the weights computes both."""
        raise RuntimeError("the weights of this linear are merged with another's; call the merged one and `add`")
