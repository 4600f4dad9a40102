"""One way against another on one machine: models of eight layers, timed in turns, A B A B.

Dependent launches, steps launched ahead, prompts as graphs, batch invariance, the kernels of many int4 rows and of few
dense ones. The suite's `linears` and `head` time these kernels by themselves; here each is part of a step. Ways that
differ only in how an engine is used share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.gpu.asking import first_token_seconds, text, tokens_per_second
from benchmarks.gpu.engines import make_engine
from benchmarks.gpu.models import kernels_variable
from benchmarks.gpu.place import Place
from benchmarks.gpu.small import DEPENDENT, environment
from benchmarks.gpu.step import in_turn
from qvl_runtime import Engine

Row = dict[str, Any]
LAYERS = 8
LONGEST = 2048 + 128
TURNS = 3
DECODED = 32  # tokens of a timed answer
REQUESTS = (1, 16)
CONTEXT = 300  # tokens before it
PROMPTS = (32, 128, 300, 512)
FRESH = 100  # the first seed of prompts that are timed: their tokens must not be cached


class Way(NamedTuple):
    """A way of doing something: its name, how its engine is made, and what surrounds its use."""

    name: str
    options: dict[str, Any]
    making: Callable[[], AbstractContextManager[None]] = nullcontext
    using: Callable[[Engine], AbstractContextManager[None]] = lambda engine: nullcontext()

    @property
    def made_as_usual(self) -> bool:
        """Whether its engine is the one that anybody gets, whatever surrounds its use."""
        return not self.options and self.making is nullcontext


class Question(NamedTuple):
    """Ways of one kind of engine, and what is timed of them: requests that decode, and prompts."""

    asked: str
    kind: str
    ways: tuple[Way, ...]  # the first is what runs by default
    requests: tuple[int, ...] = REQUESTS
    prompts: tuple[int, ...] = ()


def questions() -> tuple[Question, ...]:
    """All of them."""
    return (
        Question(
            "dependent launches",
            "int4",
            (Way("on", {}), Way("off", {}, _variable(DEPENDENT, "0"))),
        ),
        Question("steps ahead", "int4", (Way("ahead", {}), Way("in turn", {}, using=in_turn))),
        Question("short prompts", "int4", (Way("as graphs", {}), Way("launched", {}, using=launched)), (), PROMPTS),
        Question(
            "batch invariance", "int4", (Way("off", {}), Way("on", {"batch_invariant": True})), prompts=(512, 2048)
        ),
        Question(
            "many rows of int4",
            "int4",
            (
                Way("built in", {}),
                Way("never wgmma", {}, lambda: wgmma("0"), lambda engine: wgmma("0")),
                Way("wgmma from 33 rows on", {}, lambda: wgmma("33-9999"), lambda engine: wgmma("33-9999")),
            ),
            (64,),
            (128, 300, 512, 1024, 2048),
        ),
        Question("dense linears", "bf16", (Way("this package's", {}), Way("cuBLAS", {}, cublas)), (1, 4, 16)),
    )


def variants(place: Place) -> Iterator[Row]:
    """A row for each question, measure and way: ms, and how much longer than the default it takes."""
    with kernels_variable("reference" if place.tiny else None):  # other parts run models in the interpreter
        yield from _variants(place)


def _variants(place: Place) -> Iterator[Row]:
    seeds = count(FRESH)
    usual: dict[str, Engine] = {}  # by kind, one at a time
    for question in questions():
        if question.kind not in usual:
            usual.clear()
            place.settle()
            usual[question.kind] = _engine(place, question.kind, question.ways[0])
        made = [way.made_as_usual for way in question.ways]
        engines = [
            usual[question.kind] if shared else _engine(place, question.kind, way)
            for way, shared in zip(question.ways, made, strict=True)
        ]
        for name, measure in _measures(place, question):
            taken: list[list[float]] = [[] for _ in engines]
            for _ in range(1 if place.tiny else TURNS):
                for i, (engine, way) in enumerate(zip(engines, question.ways, strict=True)):
                    with way.using(engine):
                        taken[i].append(measure(engine, next(seeds)))
            for way, seconds in zip(question.ways, taken, strict=True):
                at = {"question": question.asked, "model": f"{question.kind}, {LAYERS} layers", "measure": name}
                yield at | {
                    "way": way.name,
                    "ms": 1e3 * median(seconds),
                    "of_default": median(seconds) / median(taken[0]),
                }
        del engines, engine
        place.settle()


def exercise(place: Place, question: Question, way: Way, layers: int) -> None:
    """Measure one way once."""
    engine = _engine(place, question.kind, way, layers)
    with way.using(engine):
        for seed, (_, measure) in enumerate(_measures(place, question), FRESH):
            measure(engine, seed)


def _engine(place: Place, kind: str, way: Way, layers: int = LAYERS) -> Engine:
    with way.making():
        options = {} if place.tiny else way.options  # batch invariance needs kernels
        return make_engine(place, kind, 64 if place.tiny else LONGEST, layers, **options)


def _measures(place: Place, question: Question) -> Iterator[tuple[str, Callable[[Engine, int], float]]]:
    """Name and function of each measurement; a function returns seconds, and takes a seed that no prompt had before."""
    context, tokens = (3, 2) if place.tiny else (CONTEXT, DECODED)
    for requests in question.requests[: 1 if place.tiny else None]:

        def step(engine: Engine, _: int, requests: int = requests) -> float:
            prompts = [text(context, r) for r in range(requests)]  # cached from the second time on
            return requests / tokens_per_second(engine, prompts, tokens)

        yield f"a step of {requests} row{'s'[: requests > 1]} after {context} tokens", step
    for length in (3,) if place.tiny and question.prompts else question.prompts:

        def first(engine: Engine, seed: int, length: int = length) -> float:
            return first_token_seconds(place, engine, text(length, seed))

        yield f"the first token of {length}", first


def _variable(name: str, value: str) -> Callable[[], AbstractContextManager[None]]:
    return lambda: environment(name, value)


@contextmanager
def launched(engine: Engine) -> Iterator[None]:
    """Launch every kernel of a prompt from Python."""
    runner = engine.core.runner
    graphs, runner.prefill_graphs = runner.prefill_graphs, None
    try:
        yield
    finally:
        runner.prefill_graphs = graphs


@contextmanager
def wgmma(rows: str) -> Iterator[None]:
    """Let wgmma's kernel take int4 products of these rows."""
    from qvl_kernels.triton.linear.configs import wgmma_rows

    with environment("QVL_INT4_WGMMA", rows):
        wgmma_rows.cache_clear()
        try:
            yield
        finally:
            wgmma_rows.cache_clear()


@contextmanager
def cublas() -> Iterator[None]:
    """Make engines whose dense linears are torch's own products for any number of rows."""
    from qvl_kernels.triton.linear import dense_linear

    with patch.object(dense_linear, "takes", lambda weight: False):
        yield
