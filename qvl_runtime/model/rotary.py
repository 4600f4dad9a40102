"""Positions: rotary tables with dynamic NTK per request, and the log-n factors of queries."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.ops import Ops
from qvl_runtime.config.model import ModelConfig


class Positions(NamedTuple):
    """The positional inputs of attention for n tokens, all float32."""

    cos: Tensor  # [n, rotary_dim]
    sin: Tensor  # [n, rotary_dim]
    logn: Tensor  # [n], the log-n factor of the query


def ntk_alpha(config: ModelConfig, prompt_tokens: int) -> float:
    """Return the NTK factor of a request: max(1, 2^ceil(log2(n / seq_length) + 1) - 1) for a prompt of n tokens (§5.4).

    It is fixed when the request is admitted, because cached keys are stored rotated.
    """
    if not config.use_dynamic_ntk or prompt_tokens <= config.seq_length:
        return 1.0
    doublings = math.ceil(math.log2(prompt_tokens / config.seq_length) + 1)
    return float(max(1, 2**doublings - 1))


@lru_cache(maxsize=64)
def inverse_frequencies(base: float, dim: int, alpha: float) -> Tensor:
    """Return 1 / base'^(2j / dim) for j < dim / 2, with base' = base * alpha^(dim / (dim - 2)): float32 [dim / 2].

    As in the original, the power is computed first and then its reciprocal, both in float32: base'^(-2j / dim) rounds
    differently, which changes logits by 3e-4 at position 600.
    """
    base = base * alpha ** (dim / (dim - 2))
    numbers = torch.arange(0, dim, 2, device="cpu")  # cached, so whatever the device of the moment is
    return 1.0 / base ** (numbers.float() / dim)


class Frequencies:
    """The inverse frequencies of every NTK factor in use, in one tensor that is never moved."""

    MAX_FACTORS = 16  # factors are 2^k - 1 for a prompt of up to 2^(k - 1) training lengths

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.table = torch.zeros(self.MAX_FACTORS, config.rotary_dim // 2, device=device)  # float32, a row a factor
        self._config = config
        self._rows: dict[float, int] = {}

    def row(self, alpha: float) -> int:
        """Return the row of the table for a factor, which is added on first use."""
        row = self._rows.get(alpha)
        if row is None:
            row = len(self._rows)
            if row == self.MAX_FACTORS:
                raise RuntimeError(f"alpha {alpha:g} would be the 17th NTK factor; expected powers of 2, less 1")
            self.table[row] = inverse_frequencies(self._config.rotary_emb_base, self._config.rotary_dim, alpha)
            self._rows[alpha] = row
        return row


def positions_of(config: ModelConfig, positions: Tensor, frequencies: Tensor, ops: Ops = reference) -> Positions:
    """Return the tables of n tokens: positions int64 [n]; frequencies float32 [.., rotary_dim / 2], of each or of all.

    Queries at a position t from seq_length on are scaled by log(t + 1) / log(seq_length) (docs/model.md 5.3).
    """
    return Positions(*ops.rotary_tables(positions, frequencies, config.seq_length if config.use_logn_attn else None))
