"""Encode a prompt of any form as token ids and images: ChatML for chat checkpoints, raw text for base ones.

Source: docs/model.md sections 8 and 9.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import index
from typing import Any, NamedTuple, TypeAlias, cast

from qvl_runtime.errors import ConfigError, PromptError, quoted
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.images import ImageReader, LoadedImage
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.messages import Conversation, Turn, is_messages
from qvl_runtime.prompt.parts import Part, content_segment
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.streaming import StreamDecoder
from qvl_runtime.prompt.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

DEFAULT_SYSTEM = "You are a helpful assistant."
CHAT_FORMATS = ("chatml", "raw")

Prompt: TypeAlias = "str | Sequence[Part] | Mapping[str, Any]"
"""A string with tags, a list of parts, messages, or `{"token_ids": [...], "images": [...]}`."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The position of an image among the token ids."""

    start: int  # index of the first pad id
    length: int  # number of pad ids, one per image feature
    image: LoadedImage


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The model's input, and where generation must stop."""

    token_ids: list[int]
    spans: tuple[ImageSpan, ...]
    stop_ids: frozenset[int]  # any of these ends the answer and is not part of it
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # sequences that end the answer, too
    dropped_turns: int = 0  # number of oldest turns that did not fit the window


class Draft(NamedTuple):
    """A prompt as token ids whose images are not read yet."""

    segment: Segment
    dropped_turns: int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Encodes prompts for one checkpoint; stateless."""

    tokenizer: Tokenizer
    image_size: int  # S: images become S x S
    chat_format: str = "chatml"  # "raw" for a base model
    max_window_size: int = 6144  # tokens that system message and history may occupy
    system: str = DEFAULT_SYSTEM  # for messages without a system message
    limits: ImageLimits = field(default_factory=ImageLimits)
    end_ids: tuple[int, ...] = ()  # tokens that end an answer, besides the usual ones
    end_sequences: tuple[tuple[int, ...], ...] = ()  # the same for several tokens, compared as text

    def __post_init__(self) -> None:
        if self.chat_format not in CHAT_FORMATS:
            raise ConfigError(f"chat_format is {self.chat_format!r}; supported are {' and '.join(CHAT_FORMATS)}")

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt of any form. Tags are interpreted only in a plain string, not in parts or messages.

        Raises `PromptError`, `ImageError` or `DownloadError`.
        """
        return self.read_images(self.draft(prompt))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> EncodedPrompt:
        """Encode OpenAI-style messages; see `draft_chat`."""
        return self.read_images(self.draft_chat(messages))

    def draft(self, prompt: Prompt) -> Draft:
        """Encode the text of a prompt of any form; its images are counted, not read. Raises `PromptError`."""
        if isinstance(prompt, str):
            segment = self.tokenizer.encode_tagged(prompt)
        elif isinstance(prompt, Mapping):
            segment = ids_segment(self.tokenizer, prompt)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            type_name = type(prompt).__name__
            raise PromptError(f"the prompt has type {type_name}; expected a string, a list of parts or messages")
        elif is_messages(prompt):
            return self.draft_chat(cast("Sequence[Mapping[str, Any]]", prompt))
        else:
            segment = content_segment(self.tokenizer, prompt, "the prompt")
        return self._checked(Draft(segment))

    def read_images(self, draft: Draft, cancellation: Cancellation = NEVER) -> EncodedPrompt:
        """Read the images of a draft, one after another, in order.

        Raises `ImageError`, `DownloadError`, and `Canceled` if another thread cancels.
        """
        segment, reader = draft.segment, ImageReader(self.image_size, self.limits, cancellation)
        images = [reader.read(slot.source, f"image {number}") for number, slot in enumerate(segment.slots, start=1)]
        spans = tuple(
            ImageSpan(slot.start, self.tokenizer.n_queries, image)
            for slot, image in zip(segment.slots, images, strict=True)
        )
        stop_ids = self.usual_stop_ids.union(self.end_ids)
        return EncodedPrompt(
            segment.ids, spans, stop_ids, (*draft.stop_sequences, *self.end_sequences), draft.dropped_turns
        )

    def draft_chat(self, messages: Sequence[Mapping[str, Any]]) -> Draft:
        """Encode the text of OpenAI-style messages up to the start of the assistant's answer.

        The oldest turns that do not fit the window are dropped whole, their images unread, and counted in
        `dropped_turns`. A base model gets only the last question, as in the original; a warning is logged if that drops
        anything.
        """
        conversation = Conversation.from_messages(self.tokenizer, messages)
        if self.chat_format == "raw":
            if conversation.turns or conversation.system is not None:
                _log.warning(
                    "a base model (chat_format raw) supports neither a system message nor history: both are dropped"
                )
            human = tuple(self.tokenizer.encode("Human:", "none"))
            return self._checked(Draft(conversation.query, len(conversation.turns), (human,)))
        system = conversation.system
        if system is None:
            system = Segment(self.tokenizer.encode(self.system, "none"))
        segment, dropped = chatml_segment(
            self.tokenizer, system, conversation.turns, conversation.query, self.max_window_size, self.limits.max_images
        )
        return self._checked(Draft(segment, dropped))

    def _checked(self, draft: Draft) -> Draft:
        """The draft, if it has anything and no more images than allowed."""
        count, limit = len(draft.segment.slots), self.limits.max_images
        if not draft.segment.ids:
            raise PromptError("the prompt is empty: add text or an image")
        if count > limit:
            raise PromptError(
                f"the prompt has {count} images, over the limit of {limit}: "
                "ask about fewer at a time, or raise max_images"
            )
        return draft

    @property
    def usual_stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer of any checkpoint with this format."""
        tokens = self.tokenizer
        return frozenset(
            {tokens.endoftext, *((tokens.im_end, tokens.im_start) if self.chat_format == "chatml" else ())}
        )


def chatml_segment(
    tokenizer: Tokenizer,
    system: Segment,
    turns: Sequence[Turn],
    query: Segment,
    max_window_size: int,
    max_images: int = sys.maxsize,
) -> tuple[Segment, int]:
    """The ChatML form of a conversation, and the number of oldest turns that were dropped.

    Turns are added from the newest back while system message and turns stay below `max_window_size` tokens, and their
    images and those of the question do not exceed `max_images`; the first that does not fit ends this. The question is
    always included and its tokens do not count.
    """
    newline = tokenizer.encode("\n", "none")

    def block(role: str, content: Segment) -> Segment:
        head = [tokenizer.im_start, *tokenizer.encode(role, "none"), *newline]
        return Segment().extend(head, content, [tokenizer.im_end])

    start = block("system", system)
    blocks: list[Segment] = []
    remaining, images = max_window_size - len(start), max_images - len(query.slots)
    for turn in reversed(turns):
        # After a question without an answer, the original keeps the newline that would precede one.
        answer = Segment() if turn.answer is None else block("assistant", turn.answer)
        piece = Segment().extend(newline, block("user", turn.question), newline, answer)
        if len(piece) >= remaining or len(piece.slots) > images:
            break
        remaining, images = remaining - len(piece), images - len(piece.slots)
        blocks.append(piece)
    reply = [tokenizer.im_start, *tokenizer.encode("assistant", "none"), *newline]
    whole = start.extend(*reversed(blocks), newline, block("user", query), newline, reply)
    return whole, len(turns) - len(blocks)


def ids_segment(tokenizer: Tokenizer, prompt: Mapping[str, Any]) -> Segment:
    """Encode `{"token_ids": [...], "images": [...]}`: the content of each image span becomes pad ids."""
    if "token_ids" not in prompt or not set(prompt) <= {"token_ids", "images"}:
        keys = ", ".join(map(repr, prompt)) or "nothing"
        raise PromptError(f'the prompt is a dict with {keys}; expected {{"token_ids": [...], "images": [...]}}')
    try:
        ids = [index(token) for token in prompt["token_ids"]]
    except TypeError as error:
        raise PromptError(f"token_ids is not a list of whole numbers ({error}); expected token ids") from None
    if outside := [token for token in ids if not 0 <= token < tokenizer.n_vocab]:
        raise PromptError(f"token_ids holds {quoted(outside[0])}; expected ids from 0 to {tokenizer.n_vocab - 1}")
    sources = prompt.get("images")
    if sources is None:
        sources = []
    if not isinstance(sources, (list, tuple)):
        raise PromptError(f"images is {quoted(sources)}; expected a list with an image for each span of token_ids")
    spans = ids.count(tokenizer.img_start)
    if spans != len(sources):
        raise PromptError(f"token_ids has {spans} image spans, but images has {len(sources)} images")
    segment, position = Segment(), 0
    for source in sources:
        start = ids.index(tokenizer.img_start, position)
        if tokenizer.img_end not in ids[start:]:
            raise PromptError(f"the image span at index {start} of token_ids has no end (id {tokenizer.img_end})")
        segment.extend(ids[position:start], tokenizer.image_span(source))
        position = ids.index(tokenizer.img_end, start) + 1
    return segment.extend(ids[position:])


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int], stop_ids: frozenset[int]) -> str:
    """The text of the generated ids up to the first stop id, with surrounding whitespace stripped.

    Grounding tags stay: `parse_boxes` and the history of the next turn need them. Unlike the original's
    `decode_tokens`, this keeps the last token of an answer that reached the length limit, and all first characters.
    """
    decoder = StreamDecoder(tokenizer)
    answer = takewhile(lambda token: token not in stop_ids, ids)
    return ("".join(map(decoder.feed, answer)) + decoder.flush()).strip()
