"""Conversations in Qwen-VL's own fine-tuning format: a JSON list, each with its turns, images as tags in the text.

    [{"id": "1", "conversations": [
        {"from": "user", "value": "Picture 1: <img>dog.jpg</img>\\nBox the dog."},
        {"from": "assistant", "value": "<ref>The dog</ref><box>(221,425),(511,889)</box>"}]}]

Source: the TUTORIAL of the published code, "Fine-tuning"; docs/model.md section 8 for the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.chatml import DEFAULT_SYSTEM
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Tokenizer

ROLES = ("user", "assistant")
_SPACE = re.compile(r"\s*")
_PICTURE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


class Said(NamedTuple):
    """One message of a conversation."""

    role: str  # "user" or "assistant"
    text: str  # with tags


class Conversation(NamedTuple):
    """A record of a fine-tuning file."""

    where: str  # for messages: "data.json line 12 (record 3, id 'x')"
    said: tuple[Said, ...]


def read_conversations(path: Path) -> list[Conversation]:
    """Read a fine-tuning file. Pictures with a relative path are looked for beside it, else in the current folder.

    Raises `PromptError` that names the line and the record for what is not of that format, and for a missing image.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} cannot be read ({error}); expected a JSON list of conversations") from error
    found = [_conversation(raw, where, path.parent) for where, raw in _records(text, str(path))]
    if not found:
        raise PromptError(f"{path} holds no conversation; expected at least one")
    return found


def conversation_segment(tokenizer: Tokenizer, conversation: Conversation, system: str = DEFAULT_SYSTEM) -> Segment:
    """The whole conversation in ChatML as the original fine-tunes on it, tags honoured, answers included."""
    newline = tokenizer.encode("\n", "none")
    segment = Segment()
    for role, text in (Said("system", system), *conversation.said):
        try:
            content = tokenizer.encode_tagged(text)
        except PromptError as error:
            raise PromptError(f"{conversation.where}: {error}") from error
        head = [tokenizer.im_start, *tokenizer.encode(role, "none"), *newline]
        segment.extend(head, content, [tokenizer.im_end], newline)
    return segment


def _records(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list, each with its place; read one by one, since `json` forgets lines."""
    decoder, number = json.JSONDecoder(), 0
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise PromptError(f"{name} starts with {text[at : at + 20]!r}; expected a JSON list of conversations")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        number += 1
        where = f"{name} line {text.count(chr(10), 0, at) + 1} (record {number})"
        try:
            raw, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise PromptError(f"{where} is not JSON ({error}): mend it") from error
        yield where, raw
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "]"):
            raise PromptError(f"{where} is followed by {text[at : at + 20]!r}; expected a comma or the list's end")
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _conversation(raw: Any, where: str, folder: Path) -> Conversation:
    turns = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(turns, list) or not turns:
        found = ", ".join(map(repr, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise PromptError(f"{where} has {found}; expected an object with a list of 'conversations'")
    said = []
    for turn in turns:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise PromptError(
                f"{where} has the turn {turn!r:.80}; expected {{'from': 'user' or 'assistant', 'value': TEXT}}"
            )
        said.append(Said(role, _PICTURE.sub(lambda match: f"<img>{_located(match[1], where, folder)}</img>", text)))
    return Conversation(where, tuple(said))


def _located(source: str, where: str, folder: Path) -> str:
    """Where an image is; addresses and data URLs as they are."""
    if re.match(r"(https?:|data:)", source):
        return source
    for path in (folder / source, Path(source)):
        if path.is_file():
            return str(path)
    raise PromptError(f"{where} names the image {source!r}, which is neither in {folder} nor here: put it there")
