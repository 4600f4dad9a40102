"""The ops that a model calls: one protocol, which `reference`, `cpu` and `triton` implement as modules.

What each op computes, its shapes and dtypes are documented where it is defined, in `qvl_kernels.reference`. mypy checks
the three modules against the protocol below, and a test compares the signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl_kernels.reference.linears import BoundLinear, Packed, Precision
    from qvl_kernels.reference.sampling import SampledTokens, SamplingRows


class Packer(Protocol):
    """Packs GPTQ linears for the kernels of a target, on any machine, and unpacks them again."""

    def pack_gptq(
        self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
        bias: Tensor | None = None,
    ) -> Packed: ...  # fmt: skip

    def unpack_to_qweight(self, packed: Packed) -> Tensor: ...


class Ops(Packer, Protocol):
    """Every op of the forward pass, of sampling, and of binding weights to their kernels."""

    @property
    def LAYOUTS(self) -> tuple[str, ...]: ...

    # linears
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def prepare_linear(
        self, weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact"
    ) -> BoundLinear: ...
    def prepare_gptq(
        self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
        bias: Tensor | None = None, precision: Precision = "exact",
    ) -> BoundLinear: ...  # fmt: skip
    def bind(self, packed: Packed, precision: Precision = "exact") -> BoundLinear: ...
    def concat_outputs(self, first: Tensor, second: Tensor) -> Tensor: ...
    def sum_partials(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...

    # norms and elementwise
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...
    def add_layer_norm(
        self, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...
    def swiglu(self, up_gate: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
    def gelu(self, x: Tensor) -> Tensor: ...

    # embedding and positions
    def embedding(self, ids: Tensor, table: Tensor) -> Tensor: ...
    def rotary_tables(
        self, positions: Tensor, frequencies: Tensor, logn_from: int | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def rotary_to_cache(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...  # fmt: skip

    # attention and the KV cache
    def cache_width(self, head_dim: int, dtype: torch.dtype) -> int: ...
    def to_cached(self, x: Tensor, dtype: torch.dtype) -> Tensor: ...
    def from_cached(self, stored: Tensor, dtype: torch.dtype) -> Tensor: ...
    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
        query_starts: Sequence[int] | Tensor, context_lens: Sequence[int] | Tensor,
    ) -> Tensor: ...  # fmt: skip
    def rotary_attention(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
        block_tables: Tensor, query_starts: Sequence[int] | Tensor, context_lens: Sequence[int] | Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...  # fmt: skip
    def vision_attention(self, qkv: Tensor, heads: int) -> Tensor: ...
    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor: ...

    # sampling
    def greedy(self, logits: Tensor) -> SampledTokens: ...
    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledTokens: ...
