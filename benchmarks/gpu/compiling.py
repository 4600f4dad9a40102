"""Compile every kernel that the suite runs, in processes: cases, linears, small kernels, nano, models of two layers.

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
SHARES = 6  # jobs for the cases of a dtype, and for linears
MODEL_SHARES = 4  # jobs for a model: each holds 3 to 6 GB of the GPU, and all of them run at once
TINY_SHARES = 40
TOWER_SHARES = 3
NANO = "nano"  # of the parts `graphs` and `goldens`
VARIANT = "variant"
VARIANTS = ((0, 1), (3, 1), (4, 1), (4, 2), (5, 1))  # question and way: those that launch other kernels


class Job(NamedTuple):
    """A share of something to run: `what` is a kind of engine, `nano`, a way of `variants`, or a part of the suite."""

    what: str
    number: int  # of a dtype, a variant or an exercise; 0 for others
    share: int
    shares: int


def jobs(place: Place) -> list[Job]:
    """All jobs, models first as they take longest; without a GPU a single small one."""
    from benchmarks.gpu.engines import KINDS
    from benchmarks.gpu.models import EXERCISES

    if place.tiny:
        return [Job("cases", 0, TINY_SHARES - 1, TINY_SHARES)]
    found = [Job(kind, 0, share, MODEL_SHARES) for kind in KINDS for share in range(MODEL_SHARES)]
    found += [Job(VARIANT, i, 0, 1) for i in range(len(VARIANTS))]
    found += [Job(NANO, number, 0, 1) for number in range(len(EXERCISES))]
    found += [Job("cases", i, share, SHARES) for i in range(len(place.dtypes)) for share in range(SHARES)]
    found += [Job(what, 0, share, SHARES) for what in ("linears", "head") for share in range(SHARES)]
    found += [Job("tower", 0, share, TOWER_SHARES) for share in range(TOWER_SHARES)]
    return [*found, Job("small", 0, 0, 1)]


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
    elif job.what in ("linears", "head"):
        _linears(place, job)
    elif job.what == "small":
        _small(place)
    elif job.what == "tower":
        _tower(place, job)
    elif job.what == NANO:
        _nano(place, job.number)
    elif job.what == VARIANT:
        _variant(place, VARIANTS[job.number])
    else:
        _model(place, job)
    place.wait()


def _cases(place: Place, job: Job) -> None:
    from benchmarks.gpu.cases import Maker, cases
    from benchmarks.gpu.kernels import as_gpu_reads

    for i, case in enumerate(cases(Maker(place.device, place.dtypes[job.number]), place.tiny)):
        if i % job.shares == job.share:
            case.bind(place.ops, as_gpu_reads(case.inputs))()


def _linears(place: Place, job: Job) -> None:
    """Products with up to 64 rows and a prompt's, of each contender that has kernels of the package."""
    import torch

    from benchmarks.gpu.linears import HEAD_ROWS, ROWS, contenders, heads, own, random_weight
    from qvl_kernels.triton.linear.published_shapes import DECODER, SHAPES

    head = job.what == "head"
    names, all_rows, found = (("head",), HEAD_ROWS, heads(place)) if head else (DECODER, ROWS, contenders(place))
    pairs = [(one, name) for one in found if own(one) for name in names]
    for contender, name in pairs[job.share :: job.shares]:
        inputs, outputs = SHAPES[name]
        multiply = contender.make(random_weight(inputs, outputs, place.device, contender.packed))
        for rows in [rows for rows in all_rows if rows >= contender.least]:
            multiply(torch.randn(rows, inputs, device=place.device, dtype=contender.dtype))


def _small(place: Place) -> None:
    from benchmarks.gpu.small import DEPENDENT, ROWS, environment, layer

    for rows in ROWS:
        for overlapping in "10":
            with environment(DEPENDENT, overlapping):
                for calls in layer(place, place.dtypes[0], rows):
                    for call in calls.values():
                        call()


def _tower(place: Place, job: Job) -> None:
    from benchmarks.gpu.tower import exercise

    exercise(place, job.share, job.shares)


def _nano(place: Place, number: int) -> None:
    from benchmarks.gpu.models import exercise

    exercise(place, number)


def _variant(place: Place, variant: tuple[int, int]) -> None:
    """What one way of a question of `variants` runs, in a model of one layer."""
    from benchmarks.gpu.variants import exercise, questions

    question = questions()[variant[0]]
    exercise(place, question, question.ways[variant[1]], layers=1)


def _model(place: Place, job: Job) -> None:
    """Capture a share of the graphs of a model of two layers, and answer a share of the suite's prompts."""
    from benchmarks.gpu.asking import IMAGE_TOKENS, WARMED, finish, submit, text, with_picture
    from benchmarks.gpu.engines import make_engine
    from benchmarks.gpu.table import QUESTION, TEXTS
    from qvl_runtime.schedule import decode_graphs, prefill_graphs

    sizes = [rows for rows in decode_graphs.BUCKETS if rows <= 64][job.share :: job.shares]
    prefills = prefill_graphs.BUCKETS[job.share :: job.shares]
    with patch.object(decode_graphs, "BUCKETS", tuple(sizes)), patch.object(prefill_graphs, "BUCKETS", prefills):
        engine = make_engine(place, job.what, layers=2)
    prompts = [text(length, 1) for length in (WARMED, *TEXTS)]
    prompts.append(with_picture(engine, IMAGE_TOKENS + QUESTION, 1, 1))
    for prompt in prompts[job.share :: job.shares]:
        submit(engine, [prompt], 3)
        finish(engine)
