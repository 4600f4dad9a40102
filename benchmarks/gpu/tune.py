"""Search for the fastest configurations of linears on this GPU and write the file that QVL_KERNEL_CONFIGS names.

    python -m benchmarks.gpu.tune kernels.json      # the published linears: two or three minutes
    QVL_KERNEL_CONFIGS=kernels.json qvl chat ...
    python -m benchmarks.gpu.tune --dry-run         # without a GPU: does every candidate compile for A100 and H100?

Every configuration must compute the right numbers before it is timed. Entries of other GPUs already in the file are
kept. A dry run compiles every candidate, and counts those that spill registers or ask for more shared memory than the
GPU has, which a search leaves out. Exit status 1: one does not compile; 2: no GPU here runs the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.processes import do_all
from benchmarks.gpu.search_space import candidates, copy_of, kinds, op_of, operands
from qvl_kernels import UnsupportedError, ops_for

if TYPE_CHECKING:
    from benchmarks.gpu.dry_run.search import Checked
    from qvl_kernels.triton.linear.configs import Config, Regime

Cost = Callable[["Config"], float | None]  # seconds; None if the GPU has too little shared memory
SHARES = 4  # of a linear's candidates, compiled in parallel
WRONG = {torch.float16: 2**-7, torch.bfloat16: 2**-5}  # of the largest output: sixteen or eight roundings


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


def dry_run(only: str) -> int:
    """Compile the candidates for each target in processes, one a core; returns the exit status."""
    from benchmarks.gpu.dry_run.search import TARGETS, check_share, shares, summary

    began, status = time.perf_counter(), 0
    for target in TARGETS:
        checked: list[Checked] = []
        for done in do_all(check_share, shares(target, only), max(1, os.cpu_count() or 1)):
            if done.error is not None:
                print(f"{done.job}: {done.error}", file=sys.stderr)
                status = 1
            checked += done.result or []
        for one in checked:
            if one.fault:
                print(f"{target}, {one.label}: {[*one.config]} {one.fault}", flush=True)
        print(f"{summary(target, checked)} ({time.perf_counter() - began:.0f} s)", flush=True)
        status |= any(one.error for one in checked)
    return int(status)


def main(arguments: list[str] | None = None) -> int:
    """Run the search; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="the JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates, without a GPU")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of a dry run: kernels and linears, gemm.* out")
    options = parser.parse_args(arguments)
    if options.dry_run:
        return dry_run(options.only)
    if options.file is None:
        parser.error("name the file to write, or ask for a --dry-run")
    if not torch.cuda.is_available():
        print(
            "error: the tuner times kernels on a GPU, and torch finds none here; without one, --dry-run compiles its"
            " candidates, and `make kernel-report` shows what the built-in configurations cost",
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
