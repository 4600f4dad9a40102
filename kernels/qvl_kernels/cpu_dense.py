"""Dense linears on a CPU: our kernels for few rows and for bfloat16 on AMX tiles, torch's GEMM for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.cpu_library import CODES, FLOATS, LibraryError, library, pointer

FEW_DENSE = 4  # rows up to which a dense weight is read at the speed of memory; beyond, AMX tiles or torch's GEMM


def in_steps(x: Tensor, gemm: Callable[[Tensor], Tensor]) -> Tensor:
    """gemm of the rows of x [.., in]: in 16-bit floats by one or two of few numbers of rows, zeros behind the last.

    For these torch's GEMMs (oneDNN) compile code for each new number of rows and keep it, 0.5 MiB a shape of weight,
    between the activations in the heap; and prompts of a new length would wait for it. In float32 they are another
    library's, which does not.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32:
        return gemm(flat).view(*x.shape[:-1], -1)
    sizes = step_sizes(len(flat))
    missing = sum(sizes) - len(flat)
    parts = [gemm(part) for part in torch.split(F.pad(flat, (0, 0, 0, missing)) if missing else flat, sizes)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(flat)].view(*x.shape[:-1], -1)


def step_sizes(rows: int) -> list[int]:
    """The largest power of two in `rows`, and for the rest the next of 16, 32, 48, 64, 96, 128, 192, ...

    Up to 1024 rows these are 11 numbers, with zeros for 6 % of the rows on average (65 to 1024, each as often).
    One GEMM rounded up to an eighth of a power of two had 5 % and 32 numbers: on nano 39 MiB more in the heap after 150
    prompts of 5 to 1000 tokens, and still growing.
    """
    if rows <= 32:
        return [16 if rows <= 16 else 32]
    whole = 1 << rows.bit_length() - 1
    rest = rows - whole
    if rest == 0:
        return [whole]
    up = max(16, 1 << (rest - 1).bit_length())
    padded = up * 3 // 4 if up >= 64 and rest <= up * 3 // 4 else up
    return [2 * whole] if padded == whole else [whole, padded]


def in_tiles(dtype: str) -> bool:
    """Whether dense weights of a dtype, by name, meet many rows on AMX tiles here, and not in torch's GEMM."""
    try:
        return dtype == "bfloat16" and library().instruction_set == "amx"
    except LibraryError:  # plain torch runs
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`: few rows at the speed of memory, bfloat16 on AMX tiles, else more through torch's GEMM."""
    rows = x.numel() // max(1, x.shape[-1])
    dense = x.dtype == weight.dtype and x.dtype in FLOATS and weight.is_contiguous() and x.shape[-1] == weight.shape[-1]
    dense = dense and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
    if not dense or rows == 0:
        return F.linear(x, weight, bias)
    if rows > FEW_DENSE and not in_tiles(str(x.dtype).removeprefix("torch.")):
        return in_steps(x, lambda part: F.linear(part, weight, bias))
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    library().ready().linear_dense(
        x.data_ptr(), CODES[x.dtype], rows, x.shape[-1], weight.data_ptr(), len(weight), pointer(bias), y.data_ptr()
    )
    return y
