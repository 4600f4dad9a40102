"""The lines of a batch: requests as prompts and parameters, completions as answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.lines import MAX_LINE, Line
from qvl_runtime.reading.text import decode

if TYPE_CHECKING:
    from qvl_runtime.schedule.api import Completion, SamplingParams

FORMS = ("messages", "prompt", "raw")


def parse_record(line: Line, name: str, limit: int = MAX_LINE) -> dict[str, Any]:
    """The JSON object on a line of the file `name`. Raises `PromptError`, naming the line, for anything else."""
    where = f"{name} line {line.number}"
    if line.size > limit:
        raise PromptError(
            f"{where} has {line.size:,} bytes, over the limit of {limit:,}: "
            "give images as files, or raise max_line_bytes"
        )
    record = parse_json(decode(line.data, name, PromptError, line.number), where, PromptError)
    if not isinstance(record, dict):
        raise PromptError(f"{where} holds a JSON {type(record).__name__}; expected an object")
    return record


def record_id(record: Mapping[str, Any]) -> Any:
    """The id of a record, which its answer repeats. Raises `PromptError` for one that JSON cannot hold."""
    try:
        key = "custom_id" if "custom_id" in record else "id"
        json.dumps(record.get(key), allow_nan=False)
    except ValueError:
        raise PromptError(f'"{key}" is {quoted(record[key])}; expected a string, or a finite number') from None
    return record.get(key)


def has_failed(answer: Mapping[str, Any]) -> bool:
    """Whether an answer, in either form, is an error."""
    response = answer.get("response")
    status = response.get("status_code") if isinstance(response, Mapping) else 200
    return answer.get("error") is not None or status != 200


def parse_request(record: Mapping[str, Any], params: SamplingParams) -> tuple[Any, SamplingParams]:
    """The prompt of a record, and `params` updated with the record's own. Raises `PromptError` or `SamplingError`."""
    forms = [form for form in FORMS if form in record]
    unknown = sorted(set(record) - {*FORMS, "images", "id", "params"})
    if len(forms) != 1 or unknown:
        problem = f"unknown keys {', '.join(map(quoted, unknown[:5]))}" if unknown else f"{len(forms)} of them"
        raise PromptError(f'a request needs one of "messages", "prompt" (with "images") or "raw"; found {problem}')
    value, images = record[forms[0]], record.get("images")
    images = [] if images is None else images
    if forms == ["prompt"]:
        strings = isinstance(images, list) and all(isinstance(image, str) for image in images)
        if not isinstance(value, str) or not strings:
            raise PromptError('"prompt" must be a string and "images" a list of files, URLs or data URLs')
        value = [user_message(value, images)]
    elif images:
        raise PromptError(f'"images" goes with "prompt"; put the images of "{forms[0]}" inside it')
    elif forms == ["messages"] and not _are_messages(value):
        raise PromptError(f'"messages" is {quoted(value)}; expected a list of objects with "role" and "content"')
    elif forms == ["raw"] and not isinstance(value, (str, list, dict)):
        raise PromptError(f'"raw" is {quoted(value)}; expected a string with tags, or a list of parts')
    given = record.get("params")
    return value, params if given is None else _merge_params(given, params)


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
        raise PromptError(f'"params" is {quoted(raw)}; expected an object with some of {", ".join(sorted(known))}')
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    if isinstance(bias := values.get("logit_bias"), dict):  # JSON has strings for keys
        try:
            values["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise PromptError(f'"logit_bias" is {quoted(bias)}; expected token ids, each with a number') from None
    return replace(params, **values)


def _are_messages(value: Any) -> bool:
    """Whether a value is messages: a list of parts would be read as a prompt without the chat format."""
    return isinstance(value, list) and all(isinstance(entry, dict) and "role" in entry for entry in value)


def user_message(text: str, images: Sequence[str]) -> dict[str, Any]:
    """A chat message of the user: images first, then the text."""
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}
