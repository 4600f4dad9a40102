"""Parse OpenAI-style messages into a conversation: system message, finished turns, and the open question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.keys import OF_MESSAGES, refuse_unknown
from qvl_runtime.prompt.parts import Content, content_segment
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Allowed, Tokenizer


class Turn(NamedTuple):
    """A question and its answer; None if another question followed instead."""

    question: Segment
    answer: Segment | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Encoded messages in order, without the chat format around them."""

    system: Segment | None
    turns: Sequence[Turn]
    query: Segment

    @classmethod
    def from_messages(cls, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Parse messages of the roles system (first only), user and assistant; the last is the user's.

        Images are numbered across the conversation. Text is plain text, except for the grounding tags in assistant
        messages: the model generated them as special tokens, and history must equal what it saw. Raises `PromptError`
        for any other order, role or content.
        """
        system: Segment | None = None
        turns: list[Turn] = []
        query: Segment | None = None
        images = 0
        for index, message in enumerate(messages):
            role, content, where = _read(message, index)
            if role == "system":
                if index:
                    raise PromptError(
                        f"{where} is not the first message; expected at most one system message, at the start"
                    )
                system = _encode(tokenizer, content, where, "none")
            elif role == "user":
                if query is not None:
                    turns.append(Turn(query, None))
                query = content_segment(tokenizer, content, where, first_image=images + 1)
                images += len(query.slots)
            elif query is None:
                raise PromptError(f"{where} follows no question; expected a user message before it")
            else:
                turns.append(Turn(query, _encode(tokenizer, content, where, "grounding")))
                query = None
        if query is None:
            raise PromptError("the messages end without a question; expected a user message last")
        if not query.ids:
            raise PromptError("the last user message is empty: add a question or an image")
        return cls(system, turns, query)


def is_messages(prompt: object) -> bool:
    """Whether a prompt is a list of messages rather than of parts."""
    return isinstance(prompt, Sequence) and any(isinstance(entry, Mapping) and "role" in entry for entry in prompt)


def _read(message: object, index: int) -> tuple[str, Content, str]:
    where = f"message {index}"
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f'{where} is {quoted(message)}; expected {{"role": ..., "content": ...}}')
    role, content = message["role"], message.get("content")
    where = f"message {index} ({quoted(role)[1:-1]})"
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise PromptError(f"{where} has an unknown role; expected system, user or assistant")
    refuse_unknown(message, ("role", "content"), OF_MESSAGES, where)
    if content is None and role == "assistant":  # a turn that was canceled, or only called a tool
        content = ""
    if not isinstance(content, (str, list, tuple)):
        raise PromptError(f"{where} has content of type {type(content).__name__}; expected text or a list of parts")
    return role, content, where


def _encode(tokenizer: Tokenizer, content: Content, where: str, allowed: Allowed) -> Segment:
    segment = content_segment(tokenizer, content, where, allowed=allowed)
    if segment.slots:
        raise PromptError(f"{where} has an image; images go into user messages")
    return segment
