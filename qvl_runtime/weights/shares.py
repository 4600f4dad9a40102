"""The share of a decoder's weights that one rank of a tensor-parallel model holds, cut from a published checkpoint.

The layers are split as Megatron-LM splits them (Shoeybi et al. 2019, section 3): the projection to q, k and v and both
halves of the gated MLP by outputs, whole heads to a rank; the projections behind them by inputs, so that what a rank
computes is one summand of the output; the head by rows of the vocabulary. Inputs of a GPTQ linear are split between
groups, whose scales and zero points then stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.host_memory import release
from qvl_runtime.formats.layout import expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

Spans = tuple[tuple[int, int], ...]  # first and last + 1 of each piece that is kept, in order
BY_OUTPUT, BY_INPUT = ("attn.c_attn", "mlp.w1", "mlp.w2"), ("attn.c_proj", "mlp.c_proj")
PACKED_AT_ONCE = 32  # zero points lie in int32s: pieces of this many outputs are whole ones, at any number of bits


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `ranks` holds of a model. Raises `ConfigError` for a model that cannot be split so."""

    config: ModelConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        heads, groups = self.config.num_attention_heads, self.config.ffn_width // self._unit
        if heads % self.ranks or groups < self.ranks:
            possible = [n for n in range(1, heads + 1) if heads % n == 0 and n <= groups]
            raise ConfigError(
                f"tensor_parallel is {self.ranks}, but {heads} heads and {groups} groups of the MLP's inputs are split "
                f"evenly, or whole, only among {', '.join(map(str, possible))}"
            )
        if self.config.quantization is not None and (self.heads * self.config.kv_channels) % self._group:
            raise ConfigError(
                f"tensor_parallel is {self.ranks}, but {self.heads} heads of {self.config.kv_channels} inputs are no "
                f"whole groups of {self._group}: use fewer ranks"
            )

    @property
    def heads(self) -> int:
        """Number of the rank's attention heads."""
        return self.config.num_attention_heads // self.ranks

    @property
    def vocabulary(self) -> list[int]:
        """Number of logits that each rank computes, in order."""
        return [b - a for a, b in pairwise(_cuts(self.config.vocab_size, 1, self.ranks))]

    @property
    def unused(self) -> set[str]:
        """Modules that the rank does not hold: only the first one encodes images and embeds tokens."""
        if self.rank == 0:
            return set()
        vision = {name.rpartition(".")[0] for name in expected_tensors(self.config) if ".visual." in name}
        return vision if self.config.tie_word_embeddings else vision | {"transformer.wte"}

    def of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A view of published tensors in which those of the decoder are the rank's share, cut when they are read."""
        return _SharedTensors(self, tensors)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The rank's share of the tensor `name`, a copy; the tensor itself where every rank holds all of it.

        Raises `ConfigError` for a linear whose inputs are split and whose groups are not in order.
        """
        linear, _, kind = name.rpartition(".")
        if name == "lm_head.weight":
            start, end = self._vocabulary_span
            return tensor[start:end].contiguous()
        part = linear.partition(".h.")[2].partition(".")[2]
        if linear.startswith("transformer.h.") and part in BY_OUTPUT:
            return self._of_outputs(kind, tensor, self._output_spans(part))
        if linear.startswith("transformer.h.") and part in BY_INPUT:
            return self._of_inputs(name, kind, tensor, self._input_span(part))
        return tensor

    @property
    def _group(self) -> int:
        quantization = self.config.quantization
        return 1 if quantization is None or quantization.group_size == -1 else quantization.group_size

    @property
    def _unit(self) -> int:
        """Inputs of the MLP that stay together."""
        unit = PACKED_AT_ONCE if self.config.quantization is None else max(self._group, PACKED_AT_ONCE)
        return unit if self.config.ffn_width % unit == 0 else 1

    @property
    def _vocabulary_span(self) -> tuple[int, int]:
        cuts = _cuts(self.config.vocab_size, 1, self.ranks)
        return cuts[self.rank], cuts[self.rank + 1]

    def _input_span(self, part: str) -> tuple[int, int]:
        if part == "mlp.c_proj":
            cuts = _cuts(self.config.ffn_width, self._unit, self.ranks)
            return cuts[self.rank], cuts[self.rank + 1]
        width = self.heads * self.config.kv_channels
        return self.rank * width, (self.rank + 1) * width

    def _output_spans(self, part: str) -> Spans:
        if part != "attn.c_attn":
            return (self._input_span("mlp.c_proj"),)
        (start, end), hidden = self._input_span("attn.c_proj"), self.config.hidden_size
        return tuple((i * hidden + start, i * hidden + end) for i in range(3))

    def _of_outputs(self, kind: str, tensor: Tensor, spans: Spans) -> Tensor:
        import torch

        if kind == "g_idx":
            return tensor
        axis = 0 if kind in ("weight", "bias") else 1
        per = 1
        if kind == "qzeros" and self.config.quantization is not None:
            per = 32 // self.config.quantization.bits
        return torch.cat([tensor.narrow(axis, start // per, (end - start) // per) for start, end in spans], axis)

    def _of_inputs(self, name: str, kind: str, tensor: Tensor, span: tuple[int, int]) -> Tensor:
        import torch

        start, end = span
        if kind == "bias":  # of the sum: one rank adds it
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        if kind == "weight":
            return tensor[:, start:end].contiguous()
        quantization = self.config.quantization
        assert quantization is not None
        if quantization.group_size == -1:
            raise ConfigError("tensor_parallel needs groups of inputs; this checkpoint has one for all (group_size -1)")
        if kind == "g_idx":
            whole = torch.arange(len(tensor)) // self._group
            if not torch.equal(tensor.to(whole.dtype), whole):
                raise ConfigError(f"{name} permutes its inputs (act-order), which tensor_parallel cannot split")
            return tensor[start:end] - start // self._group
        per = {"qweight": 32 // quantization.bits}.get(kind, 0)
        if per:
            return tensor[start // per : end // per].contiguous()
        return tensor[start // self._group : end // self._group].contiguous()


class _SharedTensors(Mapping[str, "Tensor"]):
    """Tensors of which one rank holds a share."""

    def __init__(self, share: Share, tensors: Mapping[str, Tensor]) -> None:
        self._share, self._tensors = share, tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        share = self._share.cut(name, tensor)
        if share is not tensor:
            release(tensor)
        return share

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _cuts(size: int, unit: int, ranks: int) -> list[int]:
    """Where `size` is cut among ranks, as evenly as whole units allow: ranks + 1 numbers from 0 to `size`."""
    return [size // unit * rank // ranks * unit for rank in range(ranks)] + [size]
