"""GPTQ linears as AutoGPTQ stores them: the record that kernels take, packing, and round-to-nearest quantization.

An int32 holds `p = 32 / bits` codes: code `i` of a column is in int32 `i // p`, lowest bits first. The weight is

    w[o, i] = scales[g, o] * (q[i, o] - (zeros[g, o] + zero_offset)),   g = g_idx[i] or i // group_size

where `zero_offset` is 1 for the v1 format (zero points are stored minus one) and 0 for v2. A stored 15 of v1 int4 is
zero point 16. AutoGPTQ's modules disagree there (`qlinear_cuda_old` wraps it to 0, `qlinear_cuda` does not) and
symmetric checkpoints never contain it; reading it without the wrap continues 14 -> 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvl_kernels.util import cdiv
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.grid import Grid, grid_between
from qvl_runtime.formats.zero_points import resolve_offset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")  # of one linear, as AutoGPTQ names them
FLOATS_AT_ONCE = 1 << 18  # rounded together: 1 MiB, so that temporaries fit in a core's cache
FLOATS_AT_ONCE_ON_GPU = 1 << 23  # 32 MiB, so that launches take less than their work
OUTPUTS_AT_ONCE = 256  # compared with their floats together: 11 MB of floats for the widest linear


@dataclass(frozen=True, slots=True, eq=False)
class GPTQLinear:
    """One packed linear, with `in` inputs, `out` outputs and `G` groups of inputs."""

    qweight: Tensor  # int32 [in * bits / 32, out]
    qzeros: Tensor  # int32 [G, out * bits / 32]
    scales: Tensor  # float [G, out]
    g_idx: Tensor | None  # int32 [in], the group of each input; None if equal groups are in order
    bias: Tensor | None  # [out]
    bits: int
    group_size: int  # inputs per group; `in` if the checkpoint says -1
    zero_offset: int  # added to a stored zero point

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return int(self.qweight.shape[0]) * (32 // self.bits)

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return int(self.qweight.shape[1])

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], name: str, quantization: QuantizationConfig) -> GPTQLinear:
        """Gather the tensors of linear `name` from a loaded state, whose shapes were checked.

        Raises `CheckpointError` for zero points that contradict `sym`, if `g_idx` does not give each group its number
        of inputs, and if it is a permutation although `desc_act` is false: AutoGPTQ would then ignore it, so one of the
        two is wrong.
        """
        import torch

        qweight, scales = state[f"{name}.qweight"], state[f"{name}.scales"]
        in_features = qweight.shape[0] * (32 // quantization.bits)
        group_size = in_features if quantization.group_size == -1 else quantization.group_size
        in_order = _groups_in_order(in_features, group_size, qweight.device)
        g_idx = state.get(f"{name}.g_idx", in_order).to(torch.int32)  # int64 in some checkpoints
        ordered = torch.equal(g_idx, in_order)
        if not ordered:
            _check_g_idx(g_idx, in_order, name, scales.shape[0], quantization.desc_act)
        return cls(
            qweight=qweight,
            qzeros=state[f"{name}.qzeros"],
            scales=scales,
            g_idx=None if ordered and in_features % group_size == 0 else g_idx,
            bias=state.get(f"{name}.bias"),
            bits=quantization.bits,
            group_size=group_size,
            zero_offset=resolve_offset(state, name, quantization),
        )

    def to(self, device: torch.device) -> GPTQLinear:
        """Return this linear on a device; tensors that are already on it are not copied."""
        g_idx, bias = (None if tensor is None else tensor.to(device) for tensor in (self.g_idx, self.bias))
        qweight, qzeros, scales = (tensor.to(device) for tensor in (self.qweight, self.qzeros, self.scales))
        return replace(self, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx, bias=bias)

    def concat_outputs(self, other: GPTQLinear) -> GPTQLinear | None:
        """Merge two linears of the same input, outputs of `other` last; None if they group inputs differently."""
        import torch

        ours, theirs = self.g_idx, other.g_idx
        same = ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)
        alike = (self.bits, self.group_size, self.zero_offset) == (other.bits, other.group_size, other.zero_offset)
        if not (same and alike and (self.bias is None) == (other.bias is None)):
            return None
        pairs = ((self.qweight, other.qweight), (self.qzeros, other.qzeros), (self.scales, other.scales))
        qweight, qzeros, scales = (torch.cat(pair, 1) for pair in pairs)
        bias = torch.cat([self.bias, other.bias]) if self.bias is not None and other.bias is not None else None
        return replace(self, qweight=qweight, qzeros=qzeros, scales=scales, bias=bias)

    def outputs(self, first: int, end: int) -> GPTQLinear:
        """Slice outputs `first` to `end`: multiples of 32 / bits, except for an `end` that is the last."""
        per_int32 = 32 // self.bits
        columns, bias = slice(first // per_int32, cdiv(end, per_int32)), self.bias
        return replace(
            self,
            qweight=self.qweight[:, first:end],
            qzeros=self.qzeros[:, columns],
            scales=self.scales[:, first:end],
            bias=None if bias is None else bias[first:end],
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the published tensors of linear `name`, with `g_idx` and a bias (zeros if the linear has none)."""
        import torch

        g_idx, bias = self.g_idx, self.bias
        if g_idx is None:
            g_idx = _groups_in_order(self.in_features, self.group_size, self.qweight.device)
        if bias is None:
            bias = torch.zeros(self.out_features, device=self.qweight.device)
        tensors = (self.qweight, self.qzeros, self.scales, g_idx, bias.to(torch.float16))
        return {f"{name}.{kind}": tensor for kind, tensor in zip(GPTQ_TENSORS, tensors, strict=True)}


def pack_linear(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> GPTQLinear:
    """Pack a linear of unpacked integers: codes [in, out]; scales and true zero points [G, out]."""
    import torch

    from qvl_kernels.reference import pack_rows

    return GPTQLinear(
        qweight=pack_rows(codes, bits),
        qzeros=pack_rows((zeros - zero_offset).t(), bits).t().contiguous(),
        scales=scales.to(torch.float16).contiguous(),
        g_idx=g_idx,
        bias=bias,
        bits=bits,
        group_size=group_size,
        zero_offset=zero_offset,
    )


def quantize_rtn(
    weight: Tensor, bits: int, group_size: int, sym: bool, *, bias: Tensor | None = None, zero_offset: int = 1
) -> GPTQLinear:
    """Round a weight [out, in] to the nearest point of its group's grid (`formats.grid`), at most half a scale away.

    Needs one byte per weight in addition to the result. Raises `CheckpointError` for NaN or infinity.
    """
    import torch

    out_features, in_features = weight.shape
    group_size = in_features if group_size == -1 else group_size
    at_once = FLOATS_AT_ONCE if weight.device.type == "cpu" else FLOATS_AT_ONCE_ON_GPU
    rows = max(1, at_once // in_features)
    ranges = []
    for part in torch.split(weight, rows):
        grouped = _grouped(part, group_size)
        ranges.append((grouped.amin(dim=2), grouped.amax(dim=2)))  # torch.aminmax is eight times slower
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    if not (high - low).sum(dtype=torch.float64).isfinite():  # one NaN or infinity makes the sum one
        raise CheckpointError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity and cannot be quantized")
    grid = grid_between(low, high, bits, sym, zero_offset)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    for start, part in enumerate(torch.split(weight, rows)):
        outputs, grouped = slice(start * rows, (start + 1) * rows), _grouped(part, group_size)
        part_grid = Grid(grid.scales[outputs].unsqueeze(2), grid.zeros[outputs].unsqueeze(2), grid.max_code)
        part_grid.quantize(grouped, out=grouped)
        codes[outputs] = grouped.view(len(part), -1)[:, :in_features].to(torch.int16)  # straight to bytes is slower
    return pack_linear(
        codes.t(),
        grid.scales.t(),
        grid.zeros.t(),
        _groups_in_order(in_features, group_size, weight.device) if in_features % group_size else None,
        bias,
        bits,
        group_size,
        zero_offset,
    )


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """Return a float32 copy [out, groups, group size] of a weight [out, in], the last group padded with zeros."""
    import torch

    floats = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if missing := -weight.shape[1] % group_size:
        floats = torch.nn.functional.pad(floats, (0, missing))
    return floats.view(len(weight), -1, group_size)


def _groups_in_order(in_features: int, group_size: int, device: torch.device) -> Tensor:
    import torch

    return torch.arange(in_features, dtype=torch.int32, device=device) // group_size


def _check_g_idx(g_idx: Tensor, in_order: Tensor, name: str, groups: int, desc_act: bool) -> None:
    """Raise `CheckpointError` unless `g_idx` is `in_order` in another order."""
    import torch

    if not desc_act:
        raise CheckpointError(
            f"{name}.g_idx is not in order although desc_act is false; expected i // {int((in_order == 0).sum())}: "
            "set desc_act to true in the quantization config if the checkpoint was made with act-order"
        )
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"{name}.g_idx runs from {low} to {high}; expected groups 0 to {groups - 1}")
    counts, expected = torch.bincount(g_idx, minlength=groups), torch.bincount(in_order, minlength=groups)
    if wrong := (counts != expected).nonzero().flatten().tolist():
        raise CheckpointError(
            f"{name}.g_idx gives group {wrong[0]} {int(counts[wrong[0]])} inputs; expected {int(expected[wrong[0]])}: "
            "fetch the file again, or correct group_size in the quantization config"
        )
