"""The vision encoder's and the resampler's attention in Triton's interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference
from qvl_kernels.triton.attention.vision import cross_attention, vision_attention
from tests.kernels.compare import as_good_as_torch

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("images", "patches", "heads", "dim"),
    [
        (1, 1, 1, 104),
        (2, 16, 2, 104),
        (1, 255, 1, 104),
        (1, 257, 2, 20),
        (3, 17, 3, 16),
        (1, 20, 1, 256),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_vision_attention(
    poisoned: None, rng: torch.Generator, images: int, patches: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(images, patches, 3 * heads * dim, generator=rng).to(dtype)
    want = reference.vision_attention(qkv.double(), heads)
    as_good_as_torch(vision_attention(qkv, heads), reference.vision_attention(qkv, heads), want)


@pytest.mark.parametrize(
    ("images", "queries", "patches", "heads", "dim"),
    [
        (1, 1, 1, 1, 128),
        (2, 16, 64, 2, 128),
        (1, 255, 257, 1, 32),
        (3, 7, 17, 2, 20),
    ],
)
def test_cross_attention(
    poisoned: None, rng: torch.Generator, images: int, queries: int, patches: int, heads: int, dim: int
) -> None:
    q = torch.randn(queries, heads * dim, generator=rng).half()
    k, v = (torch.randn(images, patches, heads * dim, generator=rng).half() for _ in range(2))
    want = reference.cross_attention(*(t.double() for t in (q, k, v)), heads)
    as_good_as_torch(cross_attention(q, k, v, heads), reference.cross_attention(q, k, v, heads), want)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="8 channels in 3 heads"):
        vision_attention(torch.zeros(1, 2, 24), 3)
    with pytest.raises(ValueError, match="cross_attention: v is float32"):
        cross_attention(torch.zeros(4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 3, 8), 2)
