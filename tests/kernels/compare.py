"""The allowed error of a kernel against its definition.

A kernel's error against float64 may be twice that of torch at the same precision, and is never required to be below one
rounding of the largest result: two correct programs may round a tie differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Relative error (Frobenius norm) of a product against the same product in float, on Gaussian activations.
W4A8_ERROR = 0.008  # activations in int8 for each row and group: 0.6 % measured
W8_ERROR = 0.008  # weights in int8 for each output and group: 0.6 % measured
KV8_ERROR = 0.008  # keys and values in int8 for each vector


def relative(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in the Frobenius norm."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def as_good_as_torch(got: Tensor, plain: Tensor, want: Tensor) -> None:
    """Assert that `got`, ours, is as accurate as `plain`, torch's in the same dtype, against `want`, float64."""
    assert got.shape == want.shape and got.dtype == plain.dtype
    assert torch.isfinite(got).all()
    if not got.numel():
        return
    allowed = 2 * (plain.double() - want).abs().max() + EPSILON[got.dtype] * want.abs().max()
    error = (got.double() - want).abs().max()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"
