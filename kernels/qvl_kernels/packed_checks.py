"""Whether the parts of a packed linear fit one another: checked once, before a kernel gets their addresses.

Packed linears come from files, which may be damaged or written by a stranger. A kernel reads as many bytes as the sizes
say and goes where a permutation points, so each shape and dtype is compared with the sizes, and each index with its
range. Codes and scales can be anything: they make a wrong answer, not a wrong address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """A tensor of a packed linear."""

    shape: tuple[int, ...]
    dtypes: Sequence[torch.dtype]
    optional: bool = False


def check_fields(fields: Mapping[str, int], names: Sequence[str], what: str) -> None:
    """Raise `ValueError` unless the fields are exactly `names`, each a whole number from 0 on."""
    if set(fields) != set(names):
        raise ValueError(f"{what} has the fields {', '.join(sorted(fields))[:100]}; expected {', '.join(names)}")
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
            raise ValueError(f"{what} has {name} {value!r:.100}; expected a size")


def check_choice(name: str, value: int, choices: Sequence[int], what: str) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{what} has {name} {value}; expected {' or '.join(map(str, choices))}")


def check_parts(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], what: str) -> None:
    """Raise `ValueError` unless the tensors are those of `parts`, in their shapes and dtypes and contiguous."""
    missing = [name for name, part in parts.items() if name not in tensors and not part.optional]
    unknown = [name for name in tensors if name not in parts]
    if missing or unknown:
        found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r:.100}, which it should not"
        raise ValueError(f"{what} {found}; expected {', '.join(parts)}")
    for name, tensor in tensors.items():
        shape, dtypes, _ = parts[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{what} has {name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
                f"expected contiguous {expected} {list(shape)}"
            )


def check_permutation(perm: Tensor | None, inputs: int, what: str) -> None:
    """Raise `ValueError` unless `perm` has each of the inputs once, and otherwise -1, padding."""
    if perm is None:
        return
    low, high = (int(end) for end in torch.aminmax(perm)) if perm.numel() else (-1, -1)
    if low < -1 or high >= inputs:
        raise ValueError(f"{what} has a permutation with {low} to {high}; expected -1 to {inputs - 1}")
    counts = torch.bincount(perm.long() + 1, minlength=inputs + 1)[1:]  # without those of -1
    if wrong := (counts != 1).nonzero().flatten()[:1].tolist():
        raise ValueError(f"{what} has a permutation with input {wrong[0]} {int(counts[wrong[0]])} times; expected once")


def check_published(tensors: Mapping[str, Tensor], fields: Mapping[str, int]) -> tuple[int, int]:
    """Check a linear in the layout "gptq"; returns its outputs and inputs. Raises `ValueError`."""
    what = "a linear as GPTQ publishes it"
    check_fields(fields, ("bits", "zero_offset"), what)
    check_choice("bits", fields["bits"], (4, 8), what)
    check_choice("zero_offset", fields["zero_offset"], (0, 1), what)
    per_word = 32 // fields["bits"]
    if any(name not in tensors or tensors[name].dim() != 2 for name in ("qweight", "scales")):
        raise ValueError(f"{what} lacks qweight or scales with two dimensions")
    (rows, outputs), groups = tensors["qweight"].shape, len(tensors["scales"])
    inputs = rows * per_word
    if not inputs or not outputs or outputs % per_word or not 0 < groups <= inputs:
        raise ValueError(f"{what} has {outputs} outputs, {inputs} inputs and {groups} groups, which fit no packing")
    parts = {
        "qweight": Part((rows, outputs), (torch.int32,)),
        "qzeros": Part((groups, outputs // per_word), (torch.int32,)),
        "scales": Part((groups, outputs), FLOATS),
        "g_idx": Part((inputs,), (torch.int32, torch.int64), optional=True),
        "bias": Part((outputs,), FLOATS, optional=True),
    }
    check_parts(tensors, parts, what)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"{what} has g_idx {int(g_idx.min())} to {int(g_idx.max())}; expected 0 to {groups - 1}")
    return outputs, inputs
