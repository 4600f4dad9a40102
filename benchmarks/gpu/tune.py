"""Search for the fastest configurations of linears on this GPU and write the file that QVL_KERNEL_CONFIGS names.

    python -m benchmarks.gpu.tune kernels.json      # the published linears: two or three minutes
    QVL_KERNEL_CONFIGS=kernels.json qvl chat ...

Every configuration must compute the right numbers before it is timed. Entries of other GPUs already in the file are
kept. Exit status 2: no GPU here runs the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.linears import random_weight
from benchmarks.gpu.place import Place
from benchmarks.gpu.processes import do_all
from qvl_kernels import UnsupportedError, ops_for
from qvl_kernels.util import cdiv

if TYPE_CHECKING:
    from qvl_kernels.triton.linear.configs import Config, Regime

Cost = Callable[["Config"], float | None]  # seconds; None if the GPU has too little shared memory
Op = Callable[[Tensor, Any], Tensor]
ROWS: dict[Regime, int] = {"small_m": 1, "dense": 1, "gemm": 256, "wgmma": 512}  # that each kernel is timed with
GRID: dict[Regime, tuple[tuple[int, ...], ...]] = {  # rows, columns, warps and stages to try
    "small_m": ((8,), (32, 64), (1, 2, 4, 8), (1,)),
    "dense": ((8,), (16, 32, 64), (2, 4, 8), (1,)),
    "gemm": ((32, 64, 128), (128, 256), (4, 8), (2, 3, 4)),
    "wgmma": ((64, 128, 256), (128,), (4, 8), (3, 4)),
}
ANY_SPLIT = ("small_m", "dense", "wgmma")  # kernels whose splits need not have the same number of tiles
SHARES = 4  # of a linear's candidates, compiled in parallel
WRONG = {torch.float16: 2**-7, torch.bfloat16: 2**-5}  # of the largest output: sixteen or eight roundings


def candidates(kind: Regime, capability: int, inputs: int, outputs: int) -> Iterator[Config]:
    """The built-in configuration, then the others, each with half to twice the built-in number of splits."""
    from qvl_kernels.triton.linear.configs import TILES, Config, config

    built_in = config(capability, kind, ROWS[kind], inputs, outputs, bits_of(kind))
    yield built_in
    tiles = cdiv(inputs, TILES[bits_of(kind)])
    near = {max(1, built_in.splits * quarters // 4) for quarters in (2, 3, 4, 5, 6, 8)}
    splits = [n for n in sorted(near) if n <= tiles and (kind in ANY_SPLIT or tiles % n == 0)]
    for numbers in product(*GRID[kind], splits):
        made = Config._make(numbers)
        if made != built_in and outputs % made.columns == 0:
            yield made


def bits_of(kind: Regime) -> int:
    """Bits of the weight that a kernel multiplies by."""
    return 16 if kind == "dense" else 4


def kinds(capability: int) -> list[Regime]:
    """The kernels of a capability."""
    from qvl_kernels.triton.linear.configs import WGMMA_CAPABILITY

    return [kind for kind in ROWS if kind != "wgmma" or capability == WGMMA_CAPABILITY]


def op_of(kind: Regime) -> Op:
    """The product of x with a weight: a packed one, or for `dense` a tensor."""
    from qvl_kernels.triton.linear.dense import plan_dense
    from qvl_kernels.triton.linear.gemm import gemm
    from qvl_kernels.triton.linear.small_m import small_m
    from qvl_kernels.triton.linear.wgmma import wgmma

    ops: dict[str, Op] = {"small_m": small_m, "gemm": gemm, "wgmma": wgmma}
    return ops.get(kind, lambda x, weight: plan_dense(x, weight)(x))


def operands(kind: Regime, inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Any, Tensor]:
    """x, the weight of `op_of`, and the same weight dequantized [outputs, inputs]."""
    from qvl_kernels.layouts.repack import dequantize

    weight = random_weight(inputs, outputs, device)
    dtype = torch.bfloat16 if kind == "dense" else torch.float16
    x, dense = torch.randn(ROWS[kind], inputs, device=device, dtype=dtype), dequantize(weight)
    rounded = dense.to(dtype).contiguous()
    return x, rounded if kind == "dense" else weight, dense


def copy_of(weight: Any) -> Any:
    """Another weight with the same numbers elsewhere in memory."""
    return weight.clone() if isinstance(weight, Tensor) else replace(weight, words=weight.words.clone())


def fastest(tried: Iterable[Config], cost: Cost) -> tuple[Config, float]:
    """The configuration with the lowest cost; raises RuntimeError if the GPU runs none of them."""
    costs = [(made, seconds) for made in tried if (seconds := cost(made)) is not None]
    if not costs:
        raise RuntimeError("no configuration runs on this GPU: each needs more shared memory than it has")
    return min(costs, key=lambda pair: pair[1])


def timed(place: Place, ceiling: float, kind: Regime, inputs: int, outputs: int, key: tuple[int, str]) -> Cost:
    """The cost of a linear plus the read of its partial sums by the next kernel, configured as a file would be."""
    from triton.runtime.errors import OutOfResources

    from qvl_kernels.triton.linear.configs import overrides

    op, (x, weight, dense) = op_of(kind), operands(kind, inputs, outputs, place.device)
    want = x.float() @ dense.T
    copies = [weight, *(copy_of(weight) for _ in range(place.copies(weight.nbytes) - 1))]

    def cost(made: Config) -> float | None:
        overrides()[key] = made
        try:
            y = op(x, weight)
        except OutOfResources:
            return None
        got = y.sum(0) if y.dim() == 3 else y.float()
        if not bool((got - want).abs().max() <= WRONG[x.dtype] * want.abs().max()):
            raise RuntimeError(f"{key[1]} computes wrong numbers as {made}; please report it with your GPU's name")
        return place.seconds(*(partial(op, x, copy) for copy in copies)) + (y.nbytes / ceiling if y.dim() == 3 else 0.0)

    return cost


class Share(NamedTuple):
    """A share of the candidates of one linear, to be compiled."""

    kind: Regime
    name: str
    share: int


def compile_share(job: Share) -> None:
    """Run each candidate of a share once, so that its binary lands in Triton's cache."""
    from triton.runtime.errors import OutOfResources

    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear import configs
    from qvl_kernels.triton.linear.published_shapes import SHAPES

    place, (inputs, outputs) = Place.find(), SHAPES[job.name]
    here, op = configs.known(capability(place.device)), op_of(job.kind)
    x, weight, _ = operands(job.kind, inputs, outputs, place.device)
    for made in [*candidates(job.kind, here, inputs, outputs)][job.share :: SHARES]:
        configs.overrides()[here, f"{job.kind} {inputs} {outputs}"] = made
        with suppress(OutOfResources):
            op(x, weight)


def search(place: Place) -> tuple[int, dict[str, list[int]]]:
    """The capability that selects configurations, and the best one of each kernel and linear."""
    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear import configs
    from qvl_kernels.triton.linear.published_shapes import DECODER, SHAPES

    here, ceiling = configs.known(capability(place.device)), place.copy_ceiling()
    configs_by_label: dict[str, list[int]] = {}
    shares = [Share(kind, name, share) for kind in kinds(here) for name in DECODER for share in range(SHARES)]
    for done in do_all(compile_share, shares):
        if done.error is not None:  # what was not compiled here is compiled when it is timed
            print(f"{done.job}: {done.error}", file=sys.stderr)
    for kind, name in product(kinds(here), DECODER):
        inputs, outputs = SHAPES[name]
        label = f"{kind} {inputs} {outputs}"
        configs.overrides().pop((here, label), None)  # a file in use must not pass for the built-in configuration
        tried = [*candidates(kind, here, inputs, outputs)]
        best, seconds = fastest(tried, timed(place, ceiling, kind, inputs, outputs, (here, label)))
        configs_by_label[label] = [*best]
        print(f"{name}, {label}: {[*best]} takes {seconds * 1e6:.1f} us; built in is {[*tried[0]]}", flush=True)
    return here, configs_by_label


def write(path: Path, capability: int, tuned: dict[str, list[int]]) -> None:
    """Write the configurations of one capability into the file and keep those of other GPUs."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**entries, str(capability): tuned}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the search; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: the tuner times kernels on a GPU, and torch finds none here; without one, `make kernel-report`"
            " shows what the built-in configurations cost",
            file=sys.stderr,
        )
        return 2
    try:
        place = Place.find()
        ops_for(place.device)
    except UnsupportedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(options.file, *search(place))
    return 0


if __name__ == "__main__":
    sys.exit(main())
