"""Read conversations in Qwen-VL's fine-tuning format: a JSON list of records, with images as tags in the text.

    [{"id": "1", "conversations": [
        {"from": "user", "value": "Picture 1: <img>dog.jpg</img>\\nBox the dog."},
        {"from": "assistant", "value": "<ref>The dog</ref><box>(221,425),(511,889)</box>"}]}]

Source: the published code's TUTORIAL, "Fine-tuning"; docs/model.md section 8 for the template.
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
_WHITESPACE = re.compile(r"\s*")
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # "user" or "assistant"
    text: str  # with tags


class Conversation(NamedTuple):
    """One record of a fine-tuning file."""

    where: str  # for error messages: "data.json line 12 (record 3)"
    messages: tuple[Message, ...]


def read_conversations(path: Path) -> list[Conversation]:
    """Read a fine-tuning file. Relative image paths are resolved against its folder, then the current folder.

    Raises `PromptError`, naming line and record, for a wrong format or a missing image.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} cannot be read ({error}); expected a JSON list of conversations") from error
    conversations = [_conversation(raw, where, path.parent) for where, raw in _records(text, str(path))]
    if not conversations:
        raise PromptError(f"{path} holds no conversation; expected at least one")
    return conversations


def conversation_segment(tokenizer: Tokenizer, conversation: Conversation, system: str = DEFAULT_SYSTEM) -> Segment:
    """A whole conversation in ChatML, answers included and tags interpreted, as the original fine-tunes on it."""
    newline = tokenizer.encode("\n", "none")
    segment = Segment()
    for role, text in (Message("system", system), *conversation.messages):
        try:
            content = tokenizer.encode_tagged(text)
        except PromptError as error:
            raise PromptError(f"{conversation.where}: {error}") from error
        head = [tokenizer.im_start, *tokenizer.encode(role, "none"), *newline]
        segment.extend(head, content, [tokenizer.im_end], newline)
    return segment


def _records(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list with their positions; parsed one by one, since `json.loads` does not keep lines."""
    decoder, number = json.JSONDecoder(), 0
    position = _skip_whitespace(text, 0)
    if text[position : position + 1] != "[":
        raise PromptError(
            f"{name} starts with {text[position : position + 20]!r}; expected a JSON list of conversations"
        )
    position = _skip_whitespace(text, position + 1)
    while text[position : position + 1] != "]":
        number += 1
        where = f"{name} line {text.count(chr(10), 0, position) + 1} (record {number})"
        try:
            raw, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise PromptError(f"{where} is not valid JSON ({error}): fix it") from error
        yield where, raw
        position = _skip_whitespace(text, position)
        following = text[position : position + 20]
        if following[:1] not in (",", "]"):
            raise PromptError(f"{where} is followed by {following!r}; expected a comma or the end of the list")
        if following[0] == ",":
            position = _skip_whitespace(text, position + 1)


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return position if match is None else match.end()


def _conversation(raw: Any, where: str, folder: Path) -> Conversation:
    turns = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(turns, list) or not turns:
        content = ", ".join(map(repr, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise PromptError(f"{where} has {content}; expected an object with a list of 'conversations'")
    messages = []
    for turn in turns:
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise PromptError(
                f"{where} has the turn {turn!r:.80}; expected {{'from': 'user' or 'assistant', 'value': TEXT}}"
            )
        messages.append(
            Message(role, _IMAGE.sub(lambda match: f"<img>{_resolve(match[1], where, folder)}</img>", text))
        )
    return Conversation(where, tuple(messages))


def _resolve(source: str, where: str, folder: Path) -> str:
    """The path of an image; URLs and data URLs are returned unchanged."""
    if re.match(r"(https?:|data:)", source):
        return source
    for path in (folder / source, Path(source)):
        if path.is_file():
            return str(path)
    raise PromptError(f"{where} names the image {source!r}, which exists neither in {folder} nor in the current folder")
