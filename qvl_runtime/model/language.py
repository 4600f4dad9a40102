"""The decoder: blocks of paged attention and a gated MLP (SwiGLU), on the flat tokens of many requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_kernels.reference import BoundLinear, sum_partials
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.model.adapters import LayerAdapters
from qvl_runtime.model.linear import Linear, LinearBuilder
from qvl_runtime.model.rotary import Positions


class LayerCache(NamedTuple):
    """The KV cache of one layer, [blocks, H, block_size, width] each; keys are stored rotated.

    width: a head's size, plus a float32 scale for each vector if int8 (`qvl_kernels.reference.cache_width`).
    """

    k: Tensor
    v: Tensor


class Layout(NamedTuple):
    """Where the n tokens of a step are in the KV cache: R requests, request r with tokens query_starts[r] to [r + 1].

    Starts and lengths are Python numbers, but int64 tensors in a captured step, whose launches are replayed.
    """

    slots: Tensor  # int64 [n], the slot of each token's key and value
    block_tables: Tensor  # int64 [R, blocks of the longest request]
    query_starts: Sequence[int] | Tensor  # R + 1 token indices
    context_lens: Sequence[int] | Tensor  # R, tokens in the cache after this step


class Observer(Protocol):
    """Receives intermediate results by name; tests compare them with the original model's."""

    def __call__(self, name: str, value: Tensor) -> None:
        """Receive the result `name`."""
        ...


def unobserved(name: str, value: Tensor) -> None:
    """Ignore an intermediate result; the default observer."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One decoder block: attention and a gated MLP, each behind an RMS norm."""

    ops: Ops
    eps: float
    ln_1: Tensor  # [D]
    ln_2: Tensor  # [D]
    c_attn: Linear  # D to q | k | v
    c_proj: Linear
    up_gate: Linear  # the published w1 | w2, whose second half silu gates
    down: Linear  # the published mlp.c_proj

    def __call__(
        self,
        x: Tensor,
        normed: Tensor,
        positions: Positions,
        layout: Layout,
        cache: LayerCache,
        observe: Observer,
        adapters: LayerAdapters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map the residual stream x [n, D] and its ln_1 to x after attention and the MLP's output, not yet added.

        Keys and values of the tokens are written to the cache. The residual add is fused with the next norm.
        Attention's temporaries are freed before the MLP starts: otherwise 11 n D numbers would be live at once instead
        of 4, plus the MLP's. adapters: side paths of the linears, if some of the tokens use them.
        """
        attended = self._attend(normed, x, positions, layout, cache, observe, adapters)
        x, normed = self.ops.add_rms_norm(x, attended, self.ln_2, self.eps)
        del attended
        return x, self._mlp(normed, x, observe, adapters)

    def _attend(
        self,
        normed: Tensor,
        x: Tensor,
        positions: Positions,
        layout: Layout,
        cache: LayerCache,
        observe: Observer,
        adapters: LayerAdapters | None,
    ) -> Tensor:
        qkv = self.c_attn.forward_partial_sums(normed)
        if adapters is not None:
            qkv = adapters.add("attn.c_attn", normed, qkv)
        new = (qkv, positions.cos, positions.sin, positions.logn, cache.k, cache.v, layout.slots)
        cached = (layout.block_tables, layout.query_starts, layout.context_lens)
        if observe is unobserved:
            context = self.ops.rotary_attention(*new, *cached, x.dtype)
        else:
            q = self.ops.rotary_to_cache(*new, x.dtype)
            context = self.ops.paged_attention(q, cache.k, cache.v, *cached)
        attended: Tensor = self.c_proj.forward_partial_sums(context)
        if adapters is not None:
            attended = adapters.add("attn.c_proj", context, attended)
        if observe is not unobserved:
            for name, value in (
                ("ln_1", normed),
                ("c_attn", sum_partials(qkv, x.dtype)),
                ("q", q),
                ("attn_context", context),
                ("attn_out", sum_partials(attended, x.dtype)),
            ):
                observe(name, value)
        return attended

    def _mlp(self, normed: Tensor, x: Tensor, observe: Observer, adapters: LayerAdapters | None) -> Tensor:
        if observe is unobserved and adapters is None and isinstance(self.up_gate, BoundLinear) and self.up_gate.gated:
            return self.down.forward_partial_sums(self.up_gate.gated(normed))
        up_gate = self.up_gate.forward_partial_sums(normed)
        if adapters is not None:
            up_gate = adapters.add("mlp.up_gate", normed, up_gate)
        gated = self.ops.swiglu(up_gate, x.dtype)
        if observe is not unobserved:
            up, gate = sum_partials(up_gate, x.dtype).chunk(2, -1)
            for name, value in (("ln_2", normed), ("w1", up), ("w2", gate), ("gated", gated)):
                observe(name, value)
        del up_gate
        mlp = self.down.forward_partial_sums(gated)
        if adapters is not None:
            mlp = adapters.add("mlp.c_proj", gated, mlp)
        if observe is not unobserved:
            observe("mlp_out", sum_partials(mlp, x.dtype))
        return mlp


class Decoder:
    """The language model: token embedding, blocks, final norm and head."""

    def __init__(self, config: ModelConfig, linears: LinearBuilder) -> None:
        self._ops, self._eps = linears.ops, config.layer_norm_epsilon
        self.embedding = linears.state["transformer.wte.weight"]
        self._blocks = [make_block(config, linears, f"transformer.h.{i}") for i in range(config.num_hidden_layers)]
        self._ln_f = linears.state["transformer.ln_f.weight"]
        head = linears.state.pop("lm_head.weight", self.embedding)  # absent if tied
        self._head = linears.of_tensors("lm_head", head)

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        layout: Layout,
        caches: Sequence[LayerCache],
        observe: Observer = unobserved,
        adapters: Callable[[int], LayerAdapters] | None = None,
    ) -> Tensor:
        """Map embeddings x [n, D] to hidden states [n, D]: the residual stream after the last block, through ln_f.

        adapters: gives the side paths of a layer, if some of the tokens use them.
        """
        hidden = self._ops.rms_norm(x, self._blocks[0].ln_1, self._eps)
        for i, (block, cache) in enumerate(zip(self._blocks, caches, strict=True)):
            sides = None if adapters is None else adapters(i)
            x, update = block(x, hidden, positions, layout, cache, _of_layer(observe, i), sides)
            x, hidden = self._ops.add_rms_norm(x, update, self._next_norm(i), self._eps)
            del update  # otherwise it stays allocated until the next block returns
            observe(f"block{i}", x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [m, D] to logits [m, vocab], in the model's dtype."""
        return self._head(hidden)

    def _next_norm(self, i: int) -> Tensor:
        return self._blocks[i + 1].ln_1 if i + 1 < len(self._blocks) else self._ln_f


def _of_layer(observe: Observer, i: int) -> Observer:
    if observe is unobserved:
        return unobserved
    return lambda name, value: observe(f"layer{i}.{name}", value)


def make_block(config: ModelConfig, linears: LinearBuilder, name: str) -> Block:
    """Return the block whose tensors are named `name`.*, with linears built by `linears`."""
    return Block(
        linears.ops,
        config.layer_norm_epsilon,
        linears.state[f"{name}.ln_1.weight"],
        linears.state[f"{name}.ln_2.weight"],
        linears.decoder(f"{name}.attn.c_attn"),
        linears.summed(f"{name}.attn.c_proj"),
        linears.merged(f"{name}.mlp.up_gate", [f"{name}.mlp.w1", f"{name}.mlp.w2"]),
        linears.summed(f"{name}.mlp.c_proj"),
    )
