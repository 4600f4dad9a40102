"""How the int4 kernels are cut up: a plain function of capability and shape, so that nothing is tuned at start.

`QVL_KERNEL_CONFIGS` may name a JSON file that `benchmarks/gpu/tune.py` wrote on a GPU; what it holds goes first:
{"80": {"small_m 4096 12288": [16, 256, 4, 3, 4]}}, by capability, then regime, inputs and outputs.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from qvl_kernels.layouts.gpu import OUTPUTS, TILE
from qvl_kernels.triton.launch import CAPABILITIES, blocks

Regime = Literal["small_m", "gemm", "dequantize"]
FEW = 16  # rows of one tensor-core tile: the weights are read at the speed of memory
MANY = 1024  # rows from which unpacking the weight once, 1.3 passes over it in 16 bits, costs less than in each tile

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}  # A100, RTX 3090 and A10, RTX 4090, H100
PROGRAMS = 1.5  # wanted on each: 2 stages of 16 KB each outstanding are 48 KB, of the 18 that Little's law asks on H100
LEAST_TILES = 4  # a program: with fewer, filling the pipeline takes longer than running it


class Config(NamedTuple):
    """Checked where a file gives it, since a wrong one would read past the end of a tensor."""

    rows: int  # of a program's tile
    columns: int
    warps: int
    stages: int
    splits: int = 1  # of the inputs; each gives float32 partial sums


def regime(rows: int) -> Regime:
    """Which kernel runs for this many rows; the one place where that is decided."""
    return "small_m" if rows <= FEW else "gemm" if rows < MANY else "dequantize"


def config(capability: int, kind: Regime, rows: int, inputs: int, outputs: int) -> Config:
    """How to run a kernel for a weight [outputs, inputs]; outputs are the padded ones, a multiple of 128."""
    here = known(capability)
    tuned = overrides().get((here, f"{kind} {inputs} {outputs}"))
    if tuned is not None:
        return tuned if outputs % tuned.columns == 0 else tuned._replace(columns=OUTPUTS)
    made = _small_m(here, outputs) if kind == "small_m" else _gemm(here, rows, outputs)
    programs = blocks(rows, made.rows) * (outputs // made.columns)
    splits = _splits(here, programs, blocks(inputs, TILE))
    if kind == "gemm":  # whose splits have equally many tiles
        splits = next(n for n in range(splits, 0, -1) if blocks(inputs, TILE) % n == 0)
    return made._replace(splits=splits)


def known(capability: int) -> int:
    """The capability whose configurations a GPU takes: the highest of CAPABILITIES that it reaches."""
    return max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])


def _small_m(capability: int, outputs: int) -> Config:
    # 256 columns halve what each program spends on x: 0.46 of memory time on A100 where 128 columns take 0.53.
    # The 100 KB of shared memory of 8.6 and 8.9 hold two programs of 3 stages.
    return Config(FEW, 256 if outputs % 256 == 0 else 128, 4, 3)


def _gemm(capability: int, rows: int, outputs: int) -> Config:
    if capability >= 90 and rows > 64:  # wgmma: its bound is 1130 and 800 TFLOP/s, of 990 that the tensor cores give
        return Config(128, 256 if outputs % 256 == 0 else 128, 8, 3)
    # mma.sync: 64 x 128 on 4 warps would reach the tensor cores' 312 TFLOP/s on A100 and spills 48 bytes of 255
    # registers; on 8 warps it takes 176 and its bound is 276
    return Config(32, 128, 4, 3) if rows <= 32 else Config(64, 128, 8, 3)


def _splits(capability: int, programs: int, tiles: int) -> int:
    """Parts of the inputs that fill the GPU: programs of many rows do without, since partial sums cost traffic."""
    wanted = blocks(int(PROGRAMS * MULTIPROCESSORS[capability]), programs)
    return max(1, min(wanted, tiles // LEAST_TILES))


@cache
def overrides() -> dict[tuple[int, str], Config]:
    """What the file that QVL_KERNEL_CONFIGS names says, read once; raises ValueError where it says nonsense."""
    named = os.environ.get("QVL_KERNEL_CONFIGS")
    if not named:
        return {}
    found: dict[tuple[int, str], Config] = {}
    for capability, entries in json.loads(Path(named).read_text(encoding="utf-8")).items():
        for key, numbers in entries.items():
            if not _sound(numbers):
                raise ValueError(
                    f"{named}: {key!r} is {numbers}; expected [rows, columns, warps, stages, splits] with rows and"
                    " columns (128 or 256) powers of two from 16 on, and 1 to 64 of the others"
                )
            found[int(capability), key] = Config(*numbers)
    return found


def _sound(numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) != 5 or not all(type(n) is int for n in numbers):
        return False
    rows, columns, *others = numbers
    return rows in (16, 32, 64, 128, 256) and columns in (128, 256) and all(1 <= n <= 64 for n in others)
