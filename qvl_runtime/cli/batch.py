"""`qvl batch`: answer JSON Lines of requests, in order; resumes if interrupted.

A request is a JSON object on one line: "messages" (OpenAI-style), or "prompt" (a question) with optional "images", or
"raw" (a string with Qwen's tags, or a list of parts). It may have an "id", which is copied to the answer, and "params"
with fields of `SamplingParams`. An answer is one line: "index", "id" and either "text", "finish_reason", "boxes" and
"usage" (plus "alternatives" if n > 1) or "error" with the "line" of the request. A request in OpenAI's batch form is
answered in that form (openai_batch.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qvl_runtime.cli.batch_ray import RayOptions, run_on_ray
from qvl_runtime.cli.endpoints import Input, Output, check_distinct
from qvl_runtime.cli.flags import as_flags, flags_of
from qvl_runtime.cli.options import Debug, EngineOptions, Quiet, SamplingOptions, count_option
from qvl_runtime.cli.terminal import FAILED_RECORDS, progress_bar, rate, say
from qvl_runtime.engine.records import answer_record, has_failed, parse_record, parse_request, record_id
from qvl_runtime.errors import PromptError, QVLError
from qvl_runtime.reading.lines import MAX_LINE, Line
from qvl_runtime.server.openai_batch import Asked, is_openai, openai_error, openai_names, parse_openai

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Encoded, Engine
    from qvl_runtime.schedule.api import SamplingParams

MAX_WAITING = 1000  # answers that wait for an earlier one, beyond which no more requests are begun
_BEGINNING = b'{"index": '


class Name(NamedTuple):
    """What a request is called, and in which form it is answered."""

    id: Any
    line: int
    in_openai_form: bool = False


class Progress(NamedTuple):
    """Progress of a batch."""

    done: int  # answers in the file, those of earlier runs included
    errors: int  # of them
    tokens: int  # generated in this run


def batch(
    *,
    requests: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="The requests, one per line: a file, a pipe, or - for stdin.")
    ],
    answers: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="The answers in the same order: a file, or - for stdout.")
    ],
    models: EngineOptions,
    sampling: SamplingOptions,
    cluster: RayOptions,
    max_line_bytes: Annotated[
        int, count_option("The longest line that is read, images in base64 included.")
    ] = MAX_LINE,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Answer a file of requests, many at a time; resumes if interrupted.

    Each line of IN.jsonl is one of these, with optional "id" and "params":

    {"prompt": "What is this?", "images": ["dog.jpg"]}

    {"messages": [{"role": "user", "content": "Hello"}]}

    {"raw": "<img>dog.jpg</img>Describe it:"}

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

    The last is OpenAI's batch form, also with /v1/completions, and is answered in it.

    A request that fails is answered by a line with "error". The exit code is then 3.

    An interrupted run resumes when it is repeated with the same OUT.jsonl, if that is a file.

    [cyan]qvl batch questions.jsonl answers.jsonl --temperature 0 --max-tokens 64[/cyan]

    [cyan]qvl batch questions.jsonl answers/ --ray auto --temperature 0[/cyan]

    [cyan]gunzip -c questions.jsonl.gz | qvl batch - - | gzip > answers.jsonl.gz[/cyan]
    """
    params = sampling.params()
    check_distinct(requests, answers)
    if cluster.ray is not None:
        return run_on_ray(requests, answers, models, params, cluster, max_line_bytes, quiet, _in_flags)
    with closing(Input(requests)) as source, closing(Output(answers)) as target:
        job = Batch(source, target, params, max_line_bytes)
        job.resume()
        before, total = job.progress, source.count(max_line_bytes)
        if before.done and not quiet:
            of = "" if total is None else f" of {total}"
            say(f"{before.done}{of} requests already answered in {target.name}{_errors(before.errors)}")
        if job.is_complete():
            return FAILED_RECORDS if before.errors else 0
        engine, began = models.open(), time.perf_counter()
        with progress_bar(answers.name, total, before.done, shown=not quiet) as advance:
            for progress in job.run(engine):
                advance(progress.done)
        if not quiet:
            done, errors, tokens = (now - then for now, then in zip(job.progress, before, strict=True))
            seconds = time.perf_counter() - began
            say(f"wrote {done} answers{_errors(errors)} to {target.name} in {seconds:.1f} s")
            say(f"{tokens} tokens at {rate(tokens / seconds)}")
    return FAILED_RECORDS if job.progress.errors else 0


def run_batch(engine: Engine, source: Path, target: Path, params: SamplingParams) -> Iterator[Progress]:
    """Answer the requests that have no answer in `target` yet and append the answers; yields after each line.

    Raises `PromptError` if `target` holds answers to other requests.
    """
    check_distinct(source, target)
    with closing(Input(source)) as requests, closing(Output(target)) as answers:
        job = Batch(requests, answers, params)
        job.resume()
        if not job.is_complete():
            yield from job.run(engine)


class Batch:
    """Requests that are read once, in order, and their answers."""

    progress: Progress
    _engine: Engine

    def __init__(self, source: Input, target: Output, params: SamplingParams, limit: int = MAX_LINE) -> None:
        """limit: bytes of a line of either."""
        self.progress = Progress(0, 0, 0)
        self._source, self._target, self._params, self._limit = source, target, params, limit
        self._lines = source.lines(limit, self._may_wait)
        self._taken = 0  # lines
        self._open = 0  # requests that the engine has and has not answered
        self._end = 0  # bytes of the answers of earlier runs
        self._names: dict[int, Name] = {}  # of requests whose answer is not written
        self._asked: dict[int, tuple[Asked, Encoded]] = {}  # those in OpenAI's form that the engine has
        self._ready: dict[int, dict[str, Any]] = {}  # answers that wait for an earlier one to be written

    def resume(self) -> None:
        """Read the answers of earlier runs, and as many requests. Raises `PromptError` if they do not belong together.

        A last answer that was only partly written does not count.
        """
        if (path := self._target.path) is None or not path.exists():
            return
        with path.open("rb") as file:
            while (answer := file.readline(self._limit)).endswith(b"\n"):
                self._skip(answer, path)
            if answer and (not answer.startswith(_BEGINNING[: len(answer)]) or file.read(1)):
                raise PromptError(f"{path} does not end with a batch answer: remove it or use another file")

    def is_complete(self) -> bool:
        """Whether all requests are answered. Raises `PromptError` if there is none at all, which is a mistake."""
        line = next(self._lines, None)
        if line is not None:
            self._lines = chain([line], self._lines)
        elif not self._taken:
            raise PromptError(f"{self._source.name} holds no request; expected one JSON object on each line")
        return line is None

    def run(self, engine: Engine) -> Iterator[Progress]:
        """Answer what is not answered; yields after each answer that is written."""
        self._engine = engine
        self._target.begin(self._end)
        for index, result in engine.as_completed(self._requests()):
            self._open -= 1
            asked = self._asked.pop(index, None)
            if isinstance(result, QVLError):
                self._ready[index] = self._error(index, result)
            elif asked is not None:
                request, encoded = asked
                self._ready[index] = request.answer(result, encoded, engine)
            else:
                self._ready[index] = answer_record(result)
            yield from self._write()
        yield from self._write()

    def _skip(self, answer: bytes, path: Path) -> None:
        """Take the next request as answered."""
        line, number = next(self._lines, None), self._taken + 1
        if line is None:
            raise PromptError(f"{path} has more lines than {self._source.name}: remove it or use another file")
        record = self._parsed(answer)
        try:
            request_id = record_id(parse_record(line, self._source.name, self._limit))
        except QVLError:
            request_id = None
        if record.get("index") != self._taken or record.get("custom_id", record.get("id")) != request_id:
            raise PromptError(
                f"line {number} of {path} does not answer {self._source.name}: remove it or use another file"
            )
        self._taken, self._end = number, self._end + len(answer)
        self.progress = Progress(number, self.progress.errors + has_failed(record), 0)

    def _parsed(self, answer: bytes) -> dict[str, Any]:
        """An answer of an earlier run, or nothing for a line that is none."""
        try:
            return parse_record(Line(0, answer, len(answer)), self._target.name, self._limit)
        except QVLError:
            return {}

    def _requests(self) -> Iterator[tuple[int, Any, SamplingParams] | None]:
        """The requests that are valid, as they arrive; None while there is none, or while many answers wait."""
        for line in self._lines:
            if line is None:
                yield None
                continue
            while self._open and len(self._ready) > MAX_WAITING:
                yield None
            index, self._taken = self._taken, self._taken + 1
            self._names[index] = Name(None, line.number)
            try:
                record = parse_record(line, self._source.name, self._limit)
                in_openai_form = is_openai(record)
                self._names[index] = Name(record_id(record), line.number, in_openai_form)
                if in_openai_form:
                    asked = parse_openai(record, self._engine, self._params)
                    prompt, params = self._engine.encode(asked.prompt), asked.params
                    self._asked[index] = asked, prompt
                else:
                    prompt, params = parse_request(record, self._params)
            except QVLError as error:
                self._ready[index] = self._error(index, error)
            else:
                self._open += 1
                yield index, prompt, params

    def _may_wait(self) -> bool:
        """Whether to wait for a line that has not arrived: the engine has nothing to do.

        Then errors are written, which nothing else would write: the one who sends the requests may wait for them.
        """
        if self._open:
            return False
        if self._source.path is None or len(self._ready) > MAX_WAITING:
            for _ in self._write():
                pass
        return True

    def _write(self) -> Iterator[Progress]:
        """Write the answers whose turn it is."""
        while (index := self.progress.done) in self._ready:
            answer, name = self._ready.pop(index), self._names.pop(index)
            names = openai_names(index, name.id) if name.in_openai_form else {"index": index, "id": name.id}
            self._target.write(json.dumps(names | answer, ensure_ascii=False))
            usage = (answer["response"]["body"] if name.in_openai_form else answer).get("usage", {})
            _, errors, before = self.progress
            self.progress = Progress(index + 1, errors + has_failed(answer), before + usage.get("completion_tokens", 0))
            yield self.progress

    def _error(self, index: int, error: QVLError) -> dict[str, Any]:
        message, name = _in_flags(str(error)), self._names[index]
        return openai_error(message) if name.in_openai_form else {"line": name.line, "error": message}


def _in_flags(error: str) -> str:
    """An error of a request in the words of the command line."""
    return as_flags(error, _flags())


@cache
def _flags() -> dict[str, str]:
    """The parameters that a message of a request may name and that are options here, not of the request."""
    return flags_of(EngineOptions) | {"max_line_bytes": "--max-line-bytes"}


def _errors(count: int) -> str:
    return f" ({count} of them errors)" if count else ""
