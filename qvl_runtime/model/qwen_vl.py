"""Qwen-VL: the vision encoder and the decoder, called once per step for the tokens of many requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import ops_for
from qvl_kernels.reference import BoundLinear, Packed, Precision
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.model.adapters import AdapterRows, Adapters
from qvl_runtime.model.language import Decoder, LayerCache, Layout, Observer, unobserved
from qvl_runtime.model.linear import LinearBuilder, Ranks
from qvl_runtime.model.rotary import positions_of
from qvl_runtime.model.vision import VisionEncoder


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The inputs of one model call: n tokens of R requests, one request after another, without padding."""

    token_ids: Tensor  # int64 [n], on the device of the embedding table
    positions: Tensor  # int64 [n], from 0 in each request
    frequencies: Tensor  # float32 [n, rotary_dim / 2], for the NTK factor of the token's request
    layout: Layout
    image_indices: Tensor | None = None  # int64 [m], indices of the image tokens among the n
    image_features: Tensor | None = None  # [m, D], replace the embeddings of those tokens
    inputs_embeds: Tensor | None = None  # [n, D] on the model's device, if already looked up
    adapters: Sequence[AdapterRows] = ()  # the tokens that use an adapter


class QwenVL:
    """The model on one device. It holds weights but no state; the caches belong to the caller."""

    def __init__(
        self,
        config: ModelConfig,
        state: MutableMapping[str, Tensor],
        precision: Precision = "exact",
        packed: Mapping[str, Packed] | None = None,
        embedding_on_host: bool = False,
        ranks: Ranks | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """Build the model from the weights that `weights.loader` returns, on one device and in one dtype.

        state: dense tensors by published name, emptied here. packed: linears in the layout of their kernels, by the
        model's name. embedding_on_host: the table stays in host memory, and embeddings are copied to the device. ranks:
        the decoder's weights are the share of the first of these. batch_invariant: see `ops_for`.
        Raises `ConfigError` if the head is tied to that table.
        """
        norm = state["transformer.ln_f.weight"]
        self.config, self.device, self.dtype, self.precision = config, norm.device, norm.dtype, precision
        self.ops, self.embedding_on_host = ops_for(self.device, batch_invariant), embedding_on_host
        self.batch_invariant = batch_invariant
        self.adapters: Adapters | None = None  # set after loading
        linears = LinearBuilder(self.ops, state, precision, packed or {}, ranks=ranks)
        tied = config.tie_word_embeddings and precision == "exact" and "lm_head" not in linears.packed
        if embedding_on_host:
            if tied:
                raise ConfigError(
                    "embedding_on_host is set, but this model's head is its embedding table (tie_word_embeddings), "
                    "which every token reads in full: leave it out, or "
                    "convert the checkpoint with `qvl convert --head int8`"
                )
            state["transformer.wte.weight"] = state["transformer.wte.weight"].cpu()
        self.decoder = Decoder(config, linears)
        self.visual = VisionEncoder(config.visual, linears)
        on_device = {name: tensor for name, tensor in state.items() if tensor.device == self.device}
        self.bytes_by_part = _bytes_by_part(on_device, linears.bound, tied)
        self.kernels = _kernels_by_part(linears.bound)
        if embedding_on_host:
            self.kernels["embedding"] = "rows sent from the host"
        state.clear()

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor, observe: Observer = unobserved) -> Tensor:
        """Map normalized pixels float32 [P, 3, S, S] to features [P, queries, D]."""
        return self.visual.forward(pixels.to(self.device), observe)

    @torch.inference_mode()
    def forward(self, step: Step, caches: Sequence[LayerCache], observe: Observer = unobserved) -> Tensor:
        """Return the hidden states [n, D] of a step; its keys and values are written to the caches."""
        at = positions_of(self.config, step.positions, step.frequencies, self.ops)
        sides = None
        if self.adapters is not None and step.adapters:
            sides = partial(self.adapters.of_layer, rows=step.adapters)
        return self.decoder.forward(self._embed_step(step, observe), at, step.layout, caches, observe, sides)

    def _embed_step(self, step: Step, observe: Observer) -> Tensor:
        """Return the decoder's input [n, D]. The caller keeps no reference, so its first block frees it."""
        x = self.embed(step) if step.inputs_embeds is None else step.inputs_embeds
        observe("embed", x)
        return x

    @torch.inference_mode()
    def embed(self, step: Step) -> Tensor:
        """Return the embeddings [n, D] of a step's tokens, with image features in the place of image tokens."""
        x = self.embed_tokens(step.token_ids)
        if step.image_indices is not None and step.image_features is not None:
            x[step.image_indices] = step.image_features.to(x.dtype)
        return x

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Return embeddings [n, D] on the model's device; token_ids: int64 [n], on the device of the table."""
        table = self.decoder.embedding
        if self.embedding_on_host:
            return F.embedding(token_ids, table).to(self.device)
        return self.ops.embedding(token_ids, table)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [m, D] to logits [m, vocab]. Pass only the tokens that need logits."""
        return self.decoder.logits(hidden)


def _part(name: str) -> str:
    if name.startswith("transformer.visual."):
        return "vision"
    return {"transformer.wte.weight": "embedding", "lm_head": "head"}.get(name, "language")


def _bytes_by_part(rest: Mapping[str, Tensor], linears: Mapping[str, BoundLinear], tied: bool) -> dict[str, int]:
    """Return the bytes of the weights in memory: vision, language, embedding and head."""
    parts = {"vision": 0, "language": 0, "embedding": 0, "head": 0}
    sizes = {name: t.nbytes for name, t in rest.items()} | {name: bound.nbytes for name, bound in linears.items()}
    for name, size in sizes.items():
        if not (tied and name == "lm_head"):
            parts[_part(name)] += size
    return parts


def _kernels_by_part(linears: Mapping[str, BoundLinear]) -> dict[str, str]:
    """Return the kernel of the linears of each part; if there are several, with their counts."""
    counts: dict[str, Counter[str]] = {}
    for name, linear in linears.items():
        counts.setdefault(f"{_part(name)} linears", Counter())[linear.kernel] += 1
    return {
        part: next(iter(kernels))
        if len(kernels) == 1
        else "; ".join(f"{n} x {kernel}" for kernel, n in kernels.items())
        for part, kernels in counts.items()
    }
