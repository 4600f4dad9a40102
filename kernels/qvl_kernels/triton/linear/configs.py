"""Which kernel a packed linear runs for how many rows, and its tile sizes, warps, stages and split-K.

Plain functions of capability and shape, so that nothing is tuned at start. `QVL_KERNEL_CONFIGS` may name a JSON file
that `benchmarks/gpu/tune.py` wrote on a GPU; its entries take precedence:
{"80": {"small_m 4096 12288": [16, 256, 4, 3, 4]}}, by capability, then regime, inputs and outputs.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from qvl_kernels.gpus import gpu_named
from qvl_kernels.layouts.gpu import OUTPUTS, TILE
from qvl_kernels.triton.launch import CAPABILITIES
from qvl_kernels.util import cdiv

Regime = Literal["small_m", "gemm", "dequantize"]
# By bits. Rows up to which a linear is memory-bound: for int4 one tensor-core tile; for int8 a few, and beyond the
# weight is dequantized once for torch's product, three passes over what the kernel reads.
SMALL_M = {4: 16, 8: 64}
# Rows from which dequantizing an int4 weight once, 1.3 passes over it in 16 bits, costs less than in each tile.
DEQUANTIZE_M = {4: 1024, 8: SMALL_M[8] + 1}
INT8_TILE_M = 32  # rows of an int8 program where there are more than 16: programs of the same columns share the L2

MULTIPROCESSORS = {  # by capability, of the GPU whose configurations all others of that capability share
    gpu.capability: gpu.sms for gpu in map(gpu_named, ("A100-SXM4-80GB", "RTX A6000", "RTX 4090", "H100 80GB HBM3"))
}
PROGRAMS = 1.5  # on each: 2 stages of 16 KB each outstanding are 48 KB, of the 18 that Little's law asks on H100
LEAST_TILES = 4  # a program: with fewer, filling the pipeline takes longer than running it


class Config(NamedTuple):
    """Tile sizes and resources of a launch; validated when a file sets it, as a wrong one reads past a tensor's end."""

    rows: int  # of a program's tile
    columns: int
    warps: int
    stages: int
    splits: int = 1  # of K; each returns float32 partial sums


def regime(bits: int, rows: int, dtype: torch.dtype) -> Regime:
    """The kernel that a packed linear runs for x [rows, K]; the one place where that is decided."""
    if dtype == torch.float32 or rows >= DEQUANTIZE_M[bits]:
        return "dequantize"
    return "small_m" if rows <= SMALL_M[bits] else "gemm"


def config(capability: int, kind: Regime, rows: int, inputs: int, outputs: int, bits: int = 4) -> Config:
    """The configuration for a weight [outputs, inputs]; outputs are the padded ones, a multiple of 128.

    Int8 uses int4's: as many bytes a tile, and the same split-K.
    """
    chosen = _config(capability, kind, rows, inputs, outputs)
    return chosen._replace(rows=INT8_TILE_M) if bits == 8 and rows > chosen.rows else chosen


def _config(capability: int, kind: Regime, rows: int, inputs: int, outputs: int) -> Config:
    here = known(capability)
    tuned = overrides().get((here, f"{kind} {inputs} {outputs}"))
    if tuned is not None:
        return tuned if outputs % tuned.columns == 0 else tuned._replace(columns=OUTPUTS)
    made = _small_m(here, outputs) if kind == "small_m" else _gemm(here, rows, outputs)
    programs = cdiv(rows, made.rows) * (outputs // made.columns)
    splits = _splits(here, programs, cdiv(inputs, TILE))
    if kind == "gemm":  # its splits have the same number of tiles
        splits = next(n for n in range(splits, 0, -1) if cdiv(inputs, TILE) % n == 0)
    return made._replace(splits=splits)


def known(capability: int) -> int:
    """The capability whose configurations a GPU uses: the highest of CAPABILITIES that it reaches."""
    return max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])


def _small_m(capability: int, outputs: int) -> Config:
    # 256 columns halve what each program spends on x: 0.46 of memory time on A100 where 128 columns take 0.53.
    # The 100 KB of shared memory of 8.6 and 8.9 hold two programs of 3 stages.
    return Config(SMALL_M[4], 256 if outputs % 256 == 0 else 128, 4, 3)


def _gemm(capability: int, rows: int, outputs: int) -> Config:
    if capability >= 90 and rows > 64:  # wgmma: its bound is 1130 and 800 TFLOP/s, of 990 that the tensor cores give
        return Config(128, 256 if outputs % 256 == 0 else 128, 8, 3)
    # mma.sync: 64 x 128 on 4 warps would reach the tensor cores' 312 TFLOP/s on A100 and spills 48 bytes of 255
    # registers; on 8 warps it takes 176 and its bound is 276
    return Config(32, 128, 4, 3) if rows <= 32 else Config(64, 128, 8, 3)


def _splits(capability: int, programs: int, tiles: int) -> int:
    """Split-K that fills the GPU; with many rows there is none, since partial sums cost traffic."""
    splits = cdiv(int(PROGRAMS * MULTIPROCESSORS[capability]), programs)
    return max(1, min(splits, tiles // LEAST_TILES))


@cache
def overrides() -> dict[tuple[int, str], Config]:
    """The configurations in the file that QVL_KERNEL_CONFIGS names, read once; raises ValueError for an invalid one."""
    path = os.environ.get("QVL_KERNEL_CONFIGS")
    if not path:
        return {}
    found: dict[tuple[int, str], Config] = {}
    for capability, entries in json.loads(Path(path).read_text(encoding="utf-8")).items():
        for key, numbers in entries.items():
            if not _valid(numbers):
                raise ValueError(
                    f"{path}: {key!r} is {numbers}; expected [rows, columns, warps, stages, splits] with rows and"
                    " columns (128 or 256) powers of two from 16 on, and 1 to 64 of the others"
                )
            found[int(capability), key] = Config(*numbers)
    return found


def _valid(numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) != 5 or not all(type(n) is int for n in numbers):
        return False
    rows, columns, *others = numbers
    return rows in (16, 32, 64, 128, 256) and columns in (128, 256) and all(1 <= n <= 64 for n in others)
