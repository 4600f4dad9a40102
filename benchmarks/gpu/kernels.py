"""Every kernel against its definition, and its bandwidth against a large read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Maker, cases
from benchmarks.gpu.place import COLD, Place
from qvl_kernels import reference
from qvl_kernels.ops import Ops
from qvl_kernels.util import dtype_name

Row = dict[str, Any]
EACH = 6  # case that is timed without a GPU, to see that it can be
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


def correct(place: Place) -> Iterator[Row]:
    """A row for each case and dtype: `of_allowed` is the error as a share of what is allowed, `right` whether it fits.

    Allowed: twice the error of plain torch in the same dtype, both against plain torch in float32, and one rounding of
    the largest result, as two correct programs may round a tie differently.
    """
    for dtype in place.dtypes:
        for case in cases(Maker(place.device, dtype), place.tiny):
            exact = case.bind(reference, _as_float(case.inputs))()
            yardstick = case.bind(reference, _copies(case.inputs))()
            ours = case.bind(place.ops, as_gpu_reads(case.inputs))()
            share = max(
                _share(_plain(got, dtype, place.ops), _plain(plain, dtype), _plain(want, torch.float32), dtype)
                for got, plain, want in zip(ours, yardstick, exact, strict=True)
            )
            yield {"case": case.name, "dtype": dtype_name(dtype), "of_allowed": share, "right": share <= 1}
        place.settle()


def speed(place: Place, ceiling: float) -> Iterator[Row]:
    """A row for each timed case in each dtype: microseconds, GB/s of what must move, and its share of a large read."""
    for dtype in place.dtypes:
        for i, case in enumerate(cases(Maker(place.device, dtype), place.tiny)):
            if case.timed or (place.tiny and i % EACH == 0):
                yield _timed(case, place, dtype, ceiling)
        place.settle()


def _timed(case: Case, place: Place, dtype: torch.dtype, ceiling: float) -> Row:
    copies = place.copies(case.nbytes)
    taken = place.seconds(*(case.bind(place.ops, as_gpu_reads(case.inputs)) for _ in range(copies)))
    rate = case.nbytes / taken
    return {
        "case": case.name,
        "dtype": dtype_name(dtype),
        "us": taken * 1e6,
        "bytes": case.nbytes,
        "cold": copies * case.nbytes >= COLD,
        "gb_s": rate / 1e9,
        "of_read": rate / ceiling,
    }


def _share(got: Tensor, plain: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    error, torchs = ((x.double() - want.double()).abs().max() for x in (got, plain))
    return float(error / (2 * torchs + ROUNDING[dtype] * want.double().abs().max()))


def _plain(value: Tensor, dtype: torch.dtype, ops: Ops = reference) -> Tensor:
    """Dequantize an int8 cache for the comparison."""
    return ops.from_cached(value, dtype) if value.dtype == torch.int8 else value


def as_gpu_reads(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, with int8 caches in the order of the GPU's kernels."""
    from qvl_kernels.triton.attention.kv_tiles import by_block

    return tuple(by_block(value).clone() if isinstance(value, Tensor) else value for value in inputs)


def _as_float(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in float32; GPTQ scales and int8 caches stay unchanged."""
    packed = any(isinstance(value, Tensor) and value.dtype == torch.int32 for value in inputs)
    return tuple(
        value.float()
        if isinstance(value, Tensor) and value.is_floating_point() and not (packed and i == 3)
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for i, value in enumerate(inputs)
    )


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, as an op may write into its inputs."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
