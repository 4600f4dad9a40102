"""Small helpers that every package shares; importing them does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cdiv(a: int, b: int) -> int:
    """Divide and round up: how many blocks of `b` cover `a`."""
    return -(-a // b)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without torch's prefix: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
