"""Read conversations from a fine-tuning file: a JSON list of records, or one record on each line (JSONL).

    [{"id": "1", "conversations": [
        {"from": "user", "value": "Picture 1:<img>dog.jpg</img>\\nBox the dog."},
        {"from": "assistant", "value": "<ref>The dog</ref><box>(221,425),(511,889)</box>"}]}]

Published files have a space before <img>. The text is taken as it is, and the engine's prompts have none
(`listformat.image_heading`). Source: the published code's TUTORIAL, "Fine-tuning"; docs/model.md section 8 for
the template. `records` has the forms of a record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.chatml import DEFAULT_SYSTEM
from qvl_runtime.prompt.records import Conversation, Message, read_record
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.reading.json_text import parse_json_at
from qvl_runtime.reading.text import read_text

_WHITESPACE = re.compile(r"\s*")
_EXPECTED = "expected a JSON list of conversations, or one on each line"


class Reading(NamedTuple):
    """What a fine-tuning file holds: the records that can be read, and why the others cannot."""

    conversations: list[Conversation]
    faults: list[PromptError]


def read_conversations(path: Path) -> list[Conversation]:
    """Read a fine-tuning file. Relative image paths are resolved against its folder, then the current folder.

    Raises `PromptError`, naming line and record, for a wrong format or a missing image.
    """

    def fail(fault: PromptError) -> None:
        raise fault

    conversations = _read(path, fail)
    if not conversations:
        raise PromptError(f"{path} holds no conversation; expected at least one")
    return conversations


def read_with_faults(path: Path) -> Reading:
    """Read a fine-tuning file as far as possible. A list in JSON ends at text that is not JSON; lines do not.

    Raises `PromptError` for a file that cannot be read at all.
    """
    faults: list[PromptError] = []
    return Reading(_read(path, faults.append), faults)


def _read(path: Path, fail: Callable[[PromptError], None]) -> list[Conversation]:
    try:
        text = read_text(path, PromptError)
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error}); {_EXPECTED}") from error
    conversations = []
    records = _records(text, str(path), fail)
    while True:
        try:
            where, raw = next(records)
            conversations.append(read_record(raw, where, path.parent))
        except StopIteration:
            return conversations
        except PromptError as fault:  # of the file: the next record is then the end; or of one record
            fail(fault)


def conversation_segment(tokenizer: Tokenizer, conversation: Conversation, system: str = DEFAULT_SYSTEM) -> Segment:
    """A whole conversation in ChatML, answers included and tags interpreted, as the original fine-tunes on it.

    system: for a conversation without a system text.
    """
    newline = tokenizer.encode("\n", "none")
    segment = Segment()
    given = system if conversation.system is None else conversation.system
    for role, text in (Message("system", given), *conversation.messages):
        try:
            content = tokenizer.encode_tagged(text)
        except PromptError as error:
            raise PromptError(f"{conversation.where}: {error}") from error
        head = [tokenizer.im_start, *tokenizer.encode(role, "none"), *newline]
        segment.extend(head, content, [tokenizer.im_end], newline)
    return segment


def _records(text: str, name: str, fail: Callable[[PromptError], None]) -> Iterator[tuple[str, Any]]:
    """The records with their positions; parsed one by one, since `json.loads` does not keep lines.

    fail: called for a line that is not JSON, and the lines after it follow if it returns.
    """
    position, number, line = _skip_whitespace(text, 0), 0, 1
    listed = text[position : position + 1] == "["
    if not listed and text[position : position + 1] != "{":
        raise PromptError(f"{name} starts with {quoted(text[position : position + 20])}; {_EXPECTED}")
    counted = 0  # characters whose lines are in `line`
    if listed:
        position = _skip_whitespace(text, position + 1)
    while text[position : position + 1] not in ("]" if listed else "", ""):
        number += 1
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name} line {line} (record {number})"
        try:
            raw, position = parse_json_at(text, position, where, PromptError)
        except PromptError as fault:
            if listed:
                raise
            fail(fault)
            end = text.find("\n", position)
            position = len(text) if end < 0 else _skip_whitespace(text, end)
            continue
        if not listed and number == 1 and not isinstance(raw.get("conversations", raw.get("messages")) or 0, list):
            raise PromptError(f"{where} has {', '.join(map(quoted, list(raw)[:5]))}; {_EXPECTED}")
        yield where, raw
        position = _skip_whitespace(text, position)
        if listed:
            position = _after_record(text, position, where)
    if listed:
        _check_end(text, position, name)


def _after_record(text: str, position: int, where: str) -> int:
    """The start of what follows a record of a list: the next one, or the end."""
    following = text[position : position + 20]
    if following[:1] not in (",", "]"):
        raise PromptError(f"{where} is followed by {quoted(following)}; expected a comma or the end of the list")
    return _skip_whitespace(text, position + 1) if following[0] == "," else position


def _check_end(text: str, position: int, name: str) -> None:
    """Raise `PromptError` for a list without an end, or with text after it."""
    rest = text[position + 1 :].lstrip()
    if text[position : position + 1] != "]":
        raise PromptError(f"{name} ends inside its list of conversations: fetch the file again, or close the list")
    if rest:
        line = text.count("\n", 0, len(text) - len(rest)) + 1
        raise PromptError(f"{name} line {line} has {quoted(rest[:40])} after the end of the list: {_EXPECTED}")


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return position if match is None else match.end()
