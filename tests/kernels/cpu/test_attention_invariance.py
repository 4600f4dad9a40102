"""Attention in one order: alone or in a step, decoded or prefilled in any chunks, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from tests.kernels.cpu.test_invariance import DTYPES, same_bits

pytestmark = pytest.mark.unit

BLOCK_SIZE = 16


class Cached:
    """Requests of some lengths in a paged cache with shuffled blocks; unwritten slots hold NaN, or 0 in int8."""

    def __init__(
        self, rng: torch.Generator, dtype: torch.dtype, cache_dtype: torch.dtype, heads: int, dim: int,
        lengths: Sequence[int],
    ) -> None:  # fmt: skip
        widest = max(-(-n // BLOCK_SIZE) for n in lengths)
        self.lengths = list(lengths)
        self.tables = torch.randperm(widest * len(lengths), generator=rng).view(len(lengths), widest)
        shape = (self.tables.numel(), heads, BLOCK_SIZE, reference.cache_width(dim, cache_dtype))
        empty = 0 if cache_dtype == torch.int8 else torch.nan
        self.caches = [torch.full(shape, empty, dtype=cache_dtype) for _ in range(2)]
        for table, length in zip(self.tables, lengths, strict=True):
            at = torch.arange(length)
            for cache in self.caches:
                vectors = torch.randn(length, heads, dim, generator=rng).to(dtype)
                cache[table[at // BLOCK_SIZE], :, at % BLOCK_SIZE] = reference.to_cached(vectors, cache_dtype)
        self.q = [torch.randn(length, heads, dim, generator=rng).to(dtype) * 2 for length in lengths]

    def attend(self, chunks: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """The results of one step of chunks (request, first token, end), which see the tokens up to their end."""
        q = torch.cat([self.q[r][first:end] for r, first, end in chunks])
        sizes = [end - first for _, first, end in chunks]
        starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        tables = torch.stack([self.tables[r] for r, _, _ in chunks])
        y = cpu.paged_attention(q, self.caches[0], self.caches[1], tables, starts, [end for _, _, end in chunks])
        return list(torch.split(y, sizes))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (3, 128), (2, 48), (1, 256), (2, 24)])
def test_paged_attention(
    isa: str, rng: torch.Generator, threads: None, dtype: torch.dtype, cache_dtype: torch.dtype | None, heads: int,
    dim: int,
) -> None:  # fmt: skip
    """Each token decoded alone, against whole prompts and chunks in one step with others."""
    lengths = [1, 17, 300, 70]
    cached = Cached(rng, dtype, cache_dtype or dtype, heads, dim, lengths)
    alone = [torch.cat([cached.attend([(r, t, t + 1)])[0] for t in range(n)]) for r, n in enumerate(lengths)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        whole = cached.attend([(r, 0, n) for r, n in enumerate(lengths)])
        assert all(same_bits(one, other) for one, other in zip(whole, alone, strict=True))
        decoded = cached.attend([(r, n - 1, n) for r, n in enumerate(lengths)])
        assert all(same_bits(one, other[-1:]) for one, other in zip(decoded, alone, strict=True))
    for chunks in ([(2, 0, 255), (1, 15, 17), (3, 66, 70)], [(2, 255, 258), (3, 0, 33)], [(2, 258, 300), (0, 0, 1)]):
        for (r, first, end), rows in zip(chunks, cached.attend(chunks), strict=True):
            assert same_bits(rows, alone[r][first:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_images(isa: str, rng: torch.Generator, threads: None, dtype: torch.dtype) -> None:
    """Attention without a mask: an image alone against the same in a batch."""
    qkv = torch.randn(5, 65, 3 * 4 * 24, generator=rng).to(dtype)
    q, k, v = (torch.randn(*n, 96, generator=rng).to(dtype) for n in ((33,), (5, 70), (5, 70)))
    alone = torch.cat([cpu.vision_attention(image[None], 4) for image in qkv])
    crossed = torch.cat([cpu.cross_attention(q, k[i : i + 1], v[i : i + 1], 4) for i in range(5)])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for n in (1, 2, 5):
            assert same_bits(cpu.vision_attention(qkv[:n], 4), alone[:n])
            assert same_bits(cpu.cross_attention(q, k[:n], v[:n], 4), crossed[:n])
