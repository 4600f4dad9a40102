"""One record of a fine-tuning file, in any of the usual forms, as a conversation with images as tags in the text.

    {"conversations": [{"from": "user" or "human", "value": TEXT}, {"from": "assistant" or "gpt", "value": TEXT}]}
    {"messages": [{"role": "user", "content": TEXT}, ...]}

A turn from "system" may come first, or be the key `system` of the record. TEXT has images as <img>path</img>, as
Qwen-VL's own files do, or as <image>, and then `image` or `images` of the record lists their paths, as LLaVA,
LLaMA-Factory and ms-swift do; each gets the heading that the engine writes before an image, `Picture 1:`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.listformat import image_heading

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
_UNREAD = ("video", "videos", "audio", "audios", "objects", "tools")  # what changes a text and is not read
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_PLACEHOLDER = "<image>"


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # "user" or "assistant"
    text: str  # with tags


class Conversation(NamedTuple):
    """One record of a fine-tuning file."""

    where: str  # for error messages: "data.json line 12 (record 3)"
    messages: tuple[Message, ...]
    system: str | None = None  # None: the default


def read_record(raw: Any, where: str, folder: Path) -> Conversation:
    """Read one record; relative paths of images are resolved against `folder`, then the current folder.

    Raises `PromptError` that begins with `where` for another form, a missing image and anything that would be lost.
    """
    record = raw if isinstance(raw, dict) else {}
    list_key, role_key, text_key = next((form for form in _FORMS if form[0] in record), _FORMS[0])
    turns = record.get(list_key)
    if not isinstance(turns, list) or not turns:
        content = ", ".join(map(quoted, list(raw)[:5])) if isinstance(raw, dict) else type(raw).__name__
        raise PromptError(f"{where} has {content}; expected an object with a list of 'conversations' or 'messages'")
    for key in (key for key in _UNREAD if record.get(key)):
        raise PromptError(f"{where} has {key!r}, which is not read: remove the key, or the record")
    images = _images(record, where)
    system, taken = record.get("system") or None, 0
    messages: list[Message] = []
    for turn in turns:
        role, text = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        role = _ROLES.get(role) if isinstance(role, str) else None
        if role is None or not isinstance(text, str) or (role == "system" and (messages or system)):
            raise PromptError(
                f"{where} has the turn {quoted(turn)}; expected {{{role_key!r}: 'user' or 'assistant', "
                f"{text_key!r}: TEXT}}, and one system text, at the start"
            )
        if lost := next((key for key in ("image", "images") if turn.get(key)), None):
            raise PromptError(f"{where} has {lost!r} in a turn, which is not read: list the images next to the turns")
        if role == "system":
            system = text
            continue
        while _PLACEHOLDER in text and taken < len(images):
            taken += 1
            text = text.replace(_PLACEHOLDER, f"{image_heading(taken)}<img>{images[taken - 1]}</img>", 1)
        messages.append(Message(role, _with_paths(text, where, folder)))
    waiting = sum(message.text.count(_PLACEHOLDER) for message in messages)
    if images and (waiting or taken < len(images)):
        raise PromptError(
            f"{where} has {len(images)} images and {taken + waiting} times <image> in its texts; expected as many"
        )
    if system is not None and not isinstance(system, str):
        raise PromptError(f"{where} has the system text {quoted(system)}; expected a string")
    if not messages:
        raise PromptError(f"{where} has a system text alone; expected turns of user and assistant")
    return Conversation(where, tuple(messages), system)


def _images(record: Mapping[str, Any], where: str) -> list[str]:
    """The paths next to the texts."""
    images = record.get("images") or record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise PromptError(f"{where} has the images {quoted(images)}; expected paths or addresses")
    return images


def _with_paths(text: str, where: str, folder: Path) -> str:
    """The text with the path of each image as it is found."""
    outside = _IMAGE.sub("", text)
    if "<img>" in outside:
        opened = outside[outside.index("<img>") :]
        raise PromptError(f"{where} has {quoted(opened[:40])} without </img>: write <img>path</img>")
    return _IMAGE.sub(lambda match: f"<img>{_resolve(match[1], where, folder)}</img>", text)


def _resolve(source: str, where: str, folder: Path) -> str:
    """The path of an image; URLs and data URLs are returned unchanged."""
    if re.match(r"(https?:|data:)", source):
        return source
    for path in (folder / source, Path(source)):
        try:
            if path.is_file():
                return str(path)
        except (OSError, ValueError):  # a name that no file system has: too long, or with a NUL
            continue
    raise PromptError(
        f"{where} names the image {quoted(source)}, which exists neither in {folder} nor in the current folder"
    )
