"""`qvl batch`: answer a JSON Lines file of requests, in order; resumes if interrupted.

A request is a JSON object on one line: "messages" (OpenAI-style), or "prompt" (a question) with optional "images", or
"raw" (a string with Qwen's tags, or a list of parts). It may have an "id", which is copied to the answer, and "params"
with fields of `SamplingParams`. An answer is one line: "index", "id" and either "text", "finish_reason", "boxes" and
"usage" (plus "alternatives" if n > 1) or "error".
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qvl_runtime.cli.options import Debug, EngineOptions, Quiet, SamplingOptions, user_message
from qvl_runtime.cli.terminal import progress_bar, rate, say
from qvl_runtime.errors import PromptError, QVLError

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

FORMS = ("messages", "prompt", "raw")


class Progress(NamedTuple):
    """Progress of a batch."""

    done: int  # answers in the file, those of earlier runs included
    errors: int  # of this run
    tokens: int  # generated in this run


def batch(
    *,
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="The requests, one per line.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The answers, one per line in the same order.")],
    models: EngineOptions,
    sampling: SamplingOptions,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Answer a file of requests, many at a time; resumes if interrupted.

    Each line of IN.jsonl is one of these, with optional "id" and "params":

    {"prompt": "What is this?", "images": ["dog.jpg"]}

    {"messages": [{"role": "user", "content": "Hello"}]}

    {"raw": "<img>dog.jpg</img>Describe it:"}

    A request that fails is answered by a line with "error".

    [cyan]qvl batch questions.jsonl answers.jsonl --temperature 0 --max-tokens 64[/cyan]
    """
    params, total = sampling.params(), count_requests(requests)
    before = resume_at(requests, answers)
    if before and not quiet:
        say(f"{before} of {total} requests already answered in {answers}")
    engine, progress = models.open(), None
    began = time.perf_counter()
    with progress_bar(answers.name, total, before, shown=not quiet) as advance:
        for progress in run_batch(engine, requests, answers, params):
            advance(progress.done)
    if progress is not None and not quiet:
        seconds = time.perf_counter() - began
        errors = f" ({progress.errors} of them errors)" if progress.errors else ""
        say(f"wrote {progress.done - before} answers{errors} to {answers} in {seconds:.1f} s")
        say(f"{progress.tokens} tokens at {rate(progress.tokens / seconds)}")
    return 0


def count_requests(path: Path) -> int:
    """Number of requests in a file."""
    return sum(1 for _ in lines_of(path))


def lines_of(path: Path) -> Iterator[str]:
    """The non-empty lines of a file."""
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


def run_batch(engine: Engine, source: Path, target: Path, params: SamplingParams) -> Iterator[Progress]:
    """Answer the requests that have no answer in `target` yet and append the answers; yields after each line.

    Raises `PromptError` if `target` holds answers to other requests.
    """
    done = resume_at(source, target)
    ready: dict[int, dict[str, Any]] = {}  # answers that wait for an earlier one to be written
    ids: dict[int, Any] = {}

    def requests() -> Iterator[tuple[int, Any, SamplingParams]]:
        for index, line in enumerate(lines_of(source)):
            if index < done:
                continue
            try:
                record = parse_record(line)
                ids[index] = record.get("id")
                prompt, request_params = parse_request(record, params)
            except QVLError as error:
                ready[index] = {"error": str(error)}
            else:
                yield index, prompt, request_params

    errors = tokens = 0
    with target.open("a", encoding="utf-8", errors="backslashreplace") as file:

        def write() -> Iterator[Progress]:
            nonlocal done, errors, tokens
            while done in ready:
                answer = ready.pop(done)
                errors += "error" in answer
                tokens += answer.get("usage", {}).get("completion_tokens", 0)
                line = {"index": done, "id": ids.pop(done, None), **answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                done += 1
                yield Progress(done, errors, tokens)

        for index, result in engine.as_completed(requests()):
            ready[index] = {"error": str(result)} if isinstance(result, QVLError) else answer_record(result)
            yield from write()
        yield from write()


def resume_at(source: Path, target: Path) -> int:
    """Number of answers in `target`; removes a last line that was only partly written."""
    if not target.exists():
        return 0
    if source.exists() and source.samefile(target):
        raise PromptError(f"{target} holds the requests: choose another file for the answers")
    content = target.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    answers = complete.splitlines()
    for index, (answer, line) in enumerate(zip(answers, lines_of(source), strict=False)):
        if not _matches(answer, index, line):
            raise PromptError(f"line {index + 1} of {target} does not answer {source}: remove it or use another file")
    if len(answers) > count_requests(source):
        raise PromptError(f"{target} has more lines than {source}: remove it or use another file")
    if len(complete) < len(content):
        if not content[len(complete) :].startswith(b'{"index": '):
            raise PromptError(f"{target} does not end with a batch answer: remove it or use another file")
        with target.open("r+b") as file:
            file.truncate(len(complete))
    return len(answers)


def parse_record(line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises `PromptError` for anything else."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"the line is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise PromptError(f"the line holds a JSON {type(record).__name__}; expected an object")
    return record


def parse_request(record: dict[str, Any], params: SamplingParams) -> tuple[Any, SamplingParams]:
    """The prompt of a record, and `params` updated with the record's own. Raises `PromptError`."""
    forms = [form for form in FORMS if form in record]
    unknown = sorted(set(record) - {*FORMS, "images", "id", "params"})
    if len(forms) != 1 or unknown:
        problem = f"unknown keys {', '.join(map(repr, unknown))}" if unknown else f"{len(forms)} of them"
        raise PromptError(f'a request needs one of "messages", "prompt" (with "images") or "raw"; found {problem}')
    value, images = record[forms[0]], record.get("images", [])
    if forms == ["prompt"]:
        if not isinstance(value, str) or not isinstance(images, list):
            raise PromptError('"prompt" must be a string and "images" a list of files, URLs or data URLs')
        value = [user_message(value, images)]
    elif images:
        raise PromptError(f'"images" goes with "prompt"; put the images of "{forms[0]}" inside it')
    return value, _merge_params(record.get("params", {}), params)


def answer_record(completion: Completion) -> dict[str, Any]:
    """The fields of a line of answers."""
    boxes, *other_boxes = ([asdict(box) for box in answer.boxes] for answer in completion.answers)
    record: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "boxes": boxes,
        "usage": asdict(completion.usage),
    }
    if other_boxes:
        record["alternatives"] = [
            {"text": answer.text, "finish_reason": answer.finish_reason, "boxes": own_boxes}
            for answer, own_boxes in zip(completion.alternatives, other_boxes, strict=True)
        ]
    return record


def _merge_params(raw: Any, params: SamplingParams) -> SamplingParams:
    """`params` with the values of a request's "params" object. Raises `PromptError` or `SamplingError`."""
    from qvl_runtime.schedule.api import SamplingParams

    known = {field.name for field in fields(SamplingParams)}
    if not isinstance(raw, dict) or not set(raw) <= known:
        raise PromptError(f'"params" is {raw!r}; expected an object with some of {", ".join(sorted(known))}')
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    try:
        if "logit_bias" in values:
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        return replace(params, **values)
    except QVLError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise PromptError(f'"params" has a value of the wrong type ({error})') from None


def _matches(answer: bytes, index: int, request: str) -> bool:
    """Whether an answer line belongs to the request line at `index`; a request that is not valid JSON has no id."""
    try:
        record = parse_record(answer.decode("utf-8", "replace"))
    except QVLError:
        return False
    try:
        request_id = parse_record(request).get("id")
    except QVLError:
        request_id = None
    return record.get("index") == index and record.get("id") == request_id
