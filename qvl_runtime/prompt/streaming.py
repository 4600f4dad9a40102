"""Decode generated tokens one at a time: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes token ids to text deltas that never split a character.

    If a token ends in the middle of a UTF-8 sequence, its bytes are held back until the rest arrives; `flush` returns
    U+FFFD for an incomplete one. The joined deltas equal `Tokenizer.decode(ids)`, except where that could fail in
    mid-stream: an id without a token (a padding row that the model picked) and the ids in `skip` produce no text, and
    `<img>`, closed or not, is shown verbatim.
    """

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = frozenset(skip)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._skip or not 0 <= token_id < self._tokenizer.n_vocab:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD for an incomplete character at the end, else nothing. Resets the decoder."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class StopResult(NamedTuple):
    """Text that can be shown now, and whether a stop string was reached."""

    emit: str
    stopped: bool


class StopMatcher:
    """Truncates streamed text at the first stop string to complete, however the text is split into pieces.

    A tail that may still grow into a stop string is held back; the stop string itself is never emitted. If two
    complete at the same character, the longer one counts. `matched` is the stop string reached, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise PromptError("a stop string is empty; expected at least one character in each")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> StopResult:
        """Process the next piece of text; text after a stop string is dropped."""
        if self.matched is not None:
            return StopResult("", True)
        pending = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := pending.find(stop)) >= 0]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            return StopResult(pending[:start], True)
        hold = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - hold :]
        return StopResult(pending[: len(pending) - hold], False)

    def flush(self) -> str:
        """The text still held back, for generation that ended without a stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that is a proper prefix of `stop`."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
