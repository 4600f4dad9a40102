"""Compile every kernel that the suite runs, in processes: its cases, the linears of a layer, and models of two layers.

A job runs what the suite will run, once, at the same shapes, so that the same binaries land in Triton's cache. One
after another 456 kernels would take minutes; 14 processes compiled them in 29 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.gpu.place import Place
from benchmarks.gpu.processes import do_all

Row = dict[str, Any]
SHARES = 6  # jobs for the cases of a dtype, and for a model
TINY_SHARES = 40


class Job(NamedTuple):
    """A share of something to run: `what` is a kind of engine, "cases" or "linears"."""

    what: str
    dtype: int  # index into the place's dtypes; 0 for an engine
    share: int
    shares: int


def jobs(place: Place) -> list[Job]:
    """All jobs, models first as they take longest; without a GPU a single small one."""
    from benchmarks.gpu.engines import KINDS

    if place.tiny:
        return [Job("cases", 0, TINY_SHARES - 1, TINY_SHARES)]
    found = [Job(kind, 0, share, SHARES) for kind in KINDS for share in range(SHARES)]
    found += [
        Job(what, i, share, SHARES)
        for i in range(len(place.dtypes))
        for what in ("cases", "linears")
        for share in range(SHARES)
    ]
    return found


def compiled(place: Place) -> Iterator[Row]:
    """A row for each job; an error stops none of the others, as what failed compiles when it is used."""
    for done in do_all(work, jobs(place), 0 if place.tiny else None):
        row = done.job._asdict() if isinstance(done.job, Job) else {"what": str(done.job)}
        yield row | {"seconds": done.seconds, "error": done.error}


def work(job: Job) -> None:
    """Run a job's share; raises what fails."""
    place = Place.find()
    if job.what == "cases":
        _cases(place, job)
    elif job.what == "linears":
        _linears(place, job)
    else:
        _model(place, job)
    place.wait()


def _cases(place: Place, job: Job) -> None:
    from benchmarks.gpu.cases import Maker, cases
    from benchmarks.gpu.kernels import as_gpu_reads

    for i, case in enumerate(cases(Maker(place.device, place.dtypes[job.dtype]), place.tiny)):
        if i % job.shares == job.share:
            case.bind(place.ops, as_gpu_reads(case.inputs))()


def _linears(place: Place, job: Job) -> None:
    import torch

    from benchmarks.gpu.linears import ROWS, random_weight
    from qvl_kernels.triton.linear.linears import PackedLinear
    from qvl_kernels.triton.linear.published_shapes import DECODER, SHAPES

    pairs = [(name, rows) for name in DECODER for rows in ROWS]
    for name, rows in pairs[job.share :: job.shares]:
        inputs, outputs = SHAPES[name]
        x = torch.randn(rows, inputs, device=place.device, dtype=place.dtypes[job.dtype])
        PackedLinear(random_weight(inputs, outputs, place.device), None).forward_partial_sums(x)


def _model(place: Place, job: Job) -> None:
    """Capture a share of the graphs of a model of two layers, and answer a share of the suite's prompts."""
    from benchmarks.gpu.asking import IMAGE_TOKENS, finish, submit, text, with_picture
    from benchmarks.gpu.engines import make_engine
    from benchmarks.gpu.table import QUESTION, TEXTS
    from qvl_runtime.schedule import decode_graphs, prefill_graphs

    sizes = [rows for rows in decode_graphs.BUCKETS if rows <= 64][job.share :: job.shares]
    prefills = prefill_graphs.BUCKETS[job.share :: job.shares]
    with patch.object(decode_graphs, "BUCKETS", tuple(sizes)), patch.object(prefill_graphs, "BUCKETS", prefills):
        engine = make_engine(place, job.what, layers=2)
    prompts = [text(length, 1) for length in TEXTS]
    prompts.append(with_picture(engine, IMAGE_TOKENS + QUESTION, 1, 1))
    for prompt in prompts[job.share :: job.shares]:
        submit(engine, [prompt], 3)
        finish(engine)
