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
from qvl_kernels.layouts.gpu import OUTPUTS, TILE, TILE_INT8
from qvl_kernels.triton.launch import CAPABILITIES
from qvl_kernels.triton_settings import asked_wgmma_rows
from qvl_kernels.util import cdiv

Regime = Literal["small_m", "gemm", "wgmma", "dequantize", "dense"]
# By bits. Rows up to which a weight is multiplied as it is unpacked, from registers: beyond, an int4 weight meets tiles
# of many rows, and an int8 weight is dequantized once for torch's product, three passes over what the kernel reads.
# A dense weight is torch's own product beyond.
SMALL_M = {4: 32, 8: 64, 16: 16}
# Rows from which dequantizing an int4 weight once, 1.3 passes over it in 16 bits, costs less than in each tile.
DEQUANTIZE_M = {4: 1024, 8: SMALL_M[8] + 1}
WGMMA_CAPABILITY = 90  # the only one that has it: 10.0 has other instructions instead
# Rows, columns, warps and buffers of a program, by its rows. With 128 it has 160 KB of shared memory, so one fits a
# multiprocessor; with 64, 96 KB.
WGMMA = {64: (64, 128, 8, 4), 128: (128, 128, 8, 4)}
LEAST_BUFFERS = 3
# The same without wgmma. Two programs fit a multiprocessor: by registers, 192 to 208 a thread, and by shared memory, of
# which 8.6 and 8.9 have 100 KB. A warp has 32 outputs: with 16, x from shared memory takes as long as the tensor cores.
GEMM, GEMM_BUFFERS, FEWER_BUFFERS = (64, 128, 4), 3, {86: 2, 89: 2}
LEAST_GEMM_BUFFERS = 2
# Columns and warps of a program with few rows. Dense: 16 outputs of 8 warps have 16 KB under way, and leave the last
# wave of a layer's linears enough programs to fill the memory; not measured.
FEW = {"small_m": (32, 4), "dense": (16, 8)}
# A thread's, by rows of a dense program as above: with 64, four programs fit a multiprocessor, as with the 52 to 58
# that most versions of Triton take; 3.8.0 takes 48 on sm_80 instead, and spills a pointer in the loop.
DENSE_REGISTERS = {16: 64}
SMALL_M_TILES = (8, 16, 32)  # rows of a program with few rows: the registers of a tile of 64 would spill

TILES = {4: TILE, 8: TILE_INT8, 16: 64}  # inputs of a tile, by bits
MULTIPROCESSORS = {  # by capability, of the GPU whose configurations all others of that capability share
    gpu.capability: gpu.sms for gpu in map(gpu_named, ("A100-SXM4-80GB", "RTX A6000", "RTX 4090", "H100 80GB HBM3"))
}
# Programs on each. Many rows: 2 stages of 16 KB each outstanding are 48 KB, of the 18 that Little's law asks on H100.
# Few rows: measured on an H100 over 1 to 32 splits, where a layer's four linears were best at 1, 2 to 4, 1 and 4
# splits, each partial sum costing the next kernel 0.1 to 0.2 us.
PROGRAMS = {"small_m": 3.9, "gemm": 1.5, "dense": 3.9}
LEAST_TILES = {
    "small_m": 16,
    "gemm": 4,
    "dense": 32,
}  # a program: with fewer, filling the pipeline takes longer than running it
FEW_TILES = "rows of 8, 16 or 32, columns of 32, 64 or (not dense) 128, or (dense) 16"
LARGE_TILES = "rows of 16, 32, 64, 128 or 256, columns of 128 or 256, 2 stages or more (wgmma: 3, and 4 or 8 warps)"


class Config(NamedTuple):
    """Tile sizes and resources of a launch; validated when a file sets it, as a wrong one reads past a tensor's end."""

    rows: int  # of a program's tile
    columns: int
    warps: int
    stages: int
    splits: int = 1  # of K; each returns float32 partial sums


def regime(bits: int, rows: int, dtype: torch.dtype, wgmma: bool = False) -> Regime:
    """The kernel that a packed linear runs for x [rows, K]; the one place where that is decided.

    wgmma: the GPU has it, and its kernel takes the weight.
    """
    if dtype == torch.float32:
        return "dequantize"
    if rows <= SMALL_M[bits]:
        return "small_m"
    if wgmma and wgmma_rows()[0] <= rows <= wgmma_rows()[1]:
        return "wgmma"
    return "dequantize" if rows >= DEQUANTIZE_M[bits] else "gemm"


wgmma_rows = cache(asked_wgmma_rows)  # asked for at each product


def config(capability: int, kind: Regime, rows: int, inputs: int, outputs: int, bits: int = 4) -> Config:
    """The configuration for a weight [outputs, inputs]; outputs are the padded ones, a multiple of 128.

    With few rows, all but the rows of a tile depends on the weight alone, so that a row's sums are added in the same
    order whatever else is in the step.
    """
    here, tiles = known(capability), cdiv(inputs, TILES[bits])
    tuned = overrides().get((here, f"{kind} {inputs} {outputs}"))
    few_for_wgmma = kind == "wgmma" and rows <= min(WGMMA)  # tuned entries are for many
    if tuned is not None and not few_for_wgmma:
        whole = kind == "dense" or outputs % tuned.columns == 0
        tuned = tuned if whole else tuned._replace(columns=OUTPUTS)
        return tuned._replace(rows=_tile_rows(rows)) if kind in FEW else tuned
    if kind in FEW:
        made = Config(_tile_rows(rows), *FEW[kind], 1)
        return made._replace(splits=_splits(here, kind, cdiv(outputs, made.columns), tiles))
    if kind == "wgmma":
        made = Config(*WGMMA[min(WGMMA) if few_for_wgmma else max(WGMMA)])
        programs = cdiv(rows, made.rows) * (outputs // made.columns)
        return made._replace(splits=max(1, min(MULTIPROCESSORS[here] // programs, tiles // LEAST_TILES["gemm"])))
    made = Config(*GEMM, FEWER_BUFFERS.get(here, GEMM_BUFFERS))
    programs = cdiv(rows, made.rows) * (outputs // made.columns)
    return made._replace(splits=_splits(here, kind, programs, tiles))


def known(capability: int) -> int:
    """The capability whose configurations a GPU uses: the highest of CAPABILITIES that it reaches."""
    return max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])


def _tile_rows(rows: int) -> int:
    return next((n for n in SMALL_M_TILES if n >= rows), SMALL_M_TILES[-1])


def _splits(capability: int, kind: Regime, programs: int, tiles: int) -> int:
    """Split-K that fills the GPU; with many rows or outputs there is none, since partial sums cost traffic."""
    wanted = PROGRAMS[kind] * MULTIPROCESSORS[capability]
    splits = int(wanted) // programs if kind in FEW else cdiv(int(wanted), programs)
    return max(1, min(splits, tiles // LEAST_TILES[kind]))


@cache
def overrides() -> dict[tuple[int, str], Config]:
    """The configurations in the file that QVL_KERNEL_CONFIGS names, read once; raises ValueError for an invalid one."""
    path = os.environ.get("QVL_KERNEL_CONFIGS")
    if not path:
        return {}
    try:
        by_capability = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = [(int(capability), *entry) for capability, of in by_capability.items() for entry in of.items()]
    except (OSError, ValueError, AttributeError) as fault:
        raise ValueError(
            f"QVL_KERNEL_CONFIGS names {path}, which cannot be read ({fault}); expected the JSON file that"
            " `python -m benchmarks.gpu.tune` writes"
        ) from None
    found: dict[tuple[int, str], Config] = {}
    for capability, key, numbers in entries:
        if not _valid(key, numbers):
            raise ValueError(
                f"{path}: {key[:40]!r} is {str(numbers)[:80]}; expected [rows, columns, warps, stages, splits] with"
                f" {FEW_TILES if _few_rows(key) else LARGE_TILES}, 1, 2, 4 or 8 warps, and 1 to 64 of the others"
            )
        found[capability, key] = Config(*numbers)
    return found


def _few_rows(key: str) -> bool:
    return key.partition(" ")[0] in FEW


def _valid(key: str, numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) != 5 or not all(type(n) is int for n in numbers):
        return False
    rows, columns, warps, *others = numbers
    if _few_rows(key):
        fits = rows in SMALL_M_TILES and columns in ((16, 32, 64) if key.startswith("dense") else (32, 64, 128))
    else:
        fits = rows in (16, 32, 64, 128, 256) and columns in (128, 256)
        wgmma = key.startswith("wgmma")
        fits = fits and others[0] >= (LEAST_BUFFERS if wgmma else LEAST_GEMM_BUFFERS) and (warps >= 4 or not wgmma)
    return fits and warps in (1, 2, 4, 8) and all(1 <= n <= 64 for n in others)
