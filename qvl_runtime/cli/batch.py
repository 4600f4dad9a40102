"""`qvl batch`: a file of requests in, a file of answers out, in the same order; started again, it goes on.

A record is a JSON object on one line: "messages" (OpenAI-style), or "prompt" (a question) with "images" (images that
go before it), or "raw" (a string with Qwen's tags, or a list of parts). It may have an "id", which is handed through,
and "params" with the fields of `SamplingParams`. Each answer is one line: "index", "id" and either "text",
"finish_reason", "boxes", "usage" (and "alternatives" where n > 1) or "error".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.cli.terminal import content
from qvl_runtime.errors import PromptError, QVLError

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

FORMS = ("messages", "prompt", "raw")


class Progress(NamedTuple):
    """How far a batch is."""

    done: int
    errors: int
    tokens: int  # of the answers made in this run


def count_records(path: Path) -> int:
    return sum(1 for _ in lines_of(path))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file that are not empty."""
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.strip())


def run_batch(engine: Engine, source: Path, target: Path, params: SamplingParams) -> Iterator[Progress]:
    """Answer what `target` does not hold yet, and append it; yields after each line that was written.

    Raises `PromptError` where `target` holds answers to something else.
    """
    done = resume_at(source, target)
    ready: dict[int, dict[str, Any]] = {}  # answered before their turn to be written
    ids: dict[int, Any] = {}

    def requests() -> Iterator[tuple[int, Any, SamplingParams]]:
        for index, line in enumerate(lines_of(source)):
            if index < done:
                continue
            try:
                record = parse(line)
                ids[index] = record.get("id")
                prompt, own = request_of(record, params)
            except QVLError as error:
                ready[index] = {"error": str(error)}
            else:
                yield index, prompt, own

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
            ready[index] = {"error": str(result)} if isinstance(result, QVLError) else answer_of(result)
            yield from write()
        yield from write()


def resume_at(source: Path, target: Path) -> int:
    """How many answers `target` holds already; a last line that was cut off in writing is removed."""
    if not target.exists():
        return 0
    if source.exists() and source.samefile(target):
        raise PromptError(f"{target} holds the requests: name another file for the answers")
    whole = target.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    answers = kept.splitlines()
    for index, (answer, line) in enumerate(zip(answers, lines_of(source), strict=False)):
        if not _answers(answer, index, line):
            raise PromptError(f"line {index + 1} of {target} does not answer {source}: name another file, or remove it")
    if len(answers) > count_records(source):
        raise PromptError(f"{target} has more lines than {source}: name another file, or remove it")
    if len(kept) < len(whole):
        if not whole[len(kept) :].startswith(b'{"index": '):
            raise PromptError(f"{target} ends in what is no answer of a batch: name another file, or remove it")
        with target.open("r+b") as file:
            file.truncate(len(kept))
    return len(answers)


def parse(line: str) -> dict[str, Any]:
    """A record. Raises `PromptError` for what is none."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"the line is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise PromptError(f"the line holds a JSON {type(record).__name__}; expected an object")
    return record


def request_of(record: dict[str, Any], params: SamplingParams) -> tuple[Any, SamplingParams]:
    """The prompt of a record, and `params` with what the record says of its own."""
    found = [form for form in FORMS if form in record]
    unknown = sorted(set(record) - {*FORMS, "images", "id", "params"})
    if len(found) != 1 or unknown:
        said = f"unknown keys {', '.join(map(repr, unknown))}" if unknown else f"{len(found)} of them"
        raise PromptError(f'a record has one of "messages", "prompt" (with "images") and "raw"; this one has {said}')
    value, images = record[found[0]], record.get("images", [])
    if found == ["prompt"]:
        if not isinstance(value, str) or not isinstance(images, list):
            raise PromptError('"prompt" is a text and "images" a list of files, addresses or data URLs')
        value = [{"role": "user", "content": content(value, images)}]
    elif images:
        raise PromptError(f'"images" goes with "prompt"; with "{found[0]}" the images stand inside')
    return value, _own_params(record.get("params", {}), params)


def answer_of(completion: Completion) -> dict[str, Any]:
    """What a line says of an answer."""
    first, *others = ([asdict(box) for box in answer.boxes] for answer in completion.answers)
    said: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "boxes": first,
        "usage": asdict(completion.usage),
    }
    if others:
        said["alternatives"] = [
            {"text": answer.text, "finish_reason": answer.finish_reason, "boxes": boxes}
            for answer, boxes in zip(completion.alternatives, others, strict=True)
        ]
    return said


def _own_params(given: Any, params: SamplingParams) -> SamplingParams:
    from qvl_runtime.schedule.api import SamplingParams

    known = {field.name for field in fields(SamplingParams)}
    if not isinstance(given, dict) or not set(given) <= known:
        raise PromptError(f'"params" is {given!r}; expected an object with some of {", ".join(sorted(known))}')
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        if "logit_bias" in values:
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        return replace(params, **values)
    except QVLError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise PromptError(f'"params" has a value of the wrong type ({error})') from None


def _answers(answer: bytes, index: int, line: str) -> bool:
    """Whether a line of answers belongs to a record; what is no record has no id."""
    try:
        said = parse(answer.decode("utf-8", "replace"))
    except QVLError:
        return False
    try:
        name = parse(line).get("id")
    except QVLError:
        name = None
    return said.get("index") == index and said.get("id") == name
