"""Log probabilities in OpenAI's two forms: of chat answers, and of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl_runtime.prompt.streaming import StreamDecoder

if TYPE_CHECKING:
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import TokenLogprob

LOWEST = -9999.0  # for a token of probability 0: JSON has no infinity, and OpenAI uses this
Json = dict[str, Any]


class Shown:
    """Holds tokens back until the text that they begin is shown; a stop string's own tokens never are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._waiting: list[tuple[int, TokenLogprob]] = []  # with the character that each begins at
        self._decoded = self._shown = 0  # characters

    def add(self, text: str, entries: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """Take the next tokens and the text that is shown with them; returns those that are shown now."""
        for entry in entries:
            self._waiting.append((self._decoded, entry))
            self._decoded += len(self._decoder.feed(entry.token_id))
        self._shown += len(text)
        ready = [entry for start, entry in self._waiting if start < self._shown]
        del self._waiting[: len(ready)]
        return ready

    def rest(self) -> list[TokenLogprob]:
        """Those that were held back to the end."""
        entries, self._waiting = [entry for _, entry in self._waiting], []
        return entries


class ChatLogprobs:
    """The tokens of one answer as `choices[i].logprobs` of a chat has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._shown = tokenizer, Shown(tokenizer)

    def add(self, text: str, entries: Sequence[TokenLogprob]) -> list[Json]:
        """Take the next tokens and the text that is shown with them; returns those that are shown now."""
        return [
            {**self._token(e.token_id, e.logprob), "top_logprobs": [self._token(*alternative) for alternative in e.top]}
            for e in self._shown.add(text, entries)
        ]

    def _token(self, token_id: int, logprob: float) -> Json:
        data = token_bytes(self._tokenizer, token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": bounded(logprob), "bytes": list(data)}


class TextLogprobs:
    """The tokens of one choice as /v1/completions has them: four lists that grow until they are taken."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._shown = tokenizer, Shown(tokenizer)
        self._decoder = StreamDecoder(tokenizer)
        self._offset = 0  # characters before the next token
        self._entries: list[tuple[str, float | None, dict[str, float] | None, int]] = []

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]) -> None:
        """Take the tokens of the prompt; the first has no log probability."""
        self._append(token_ids[0], None)
        for entry in entries:
            self._append(entry.token_id, entry)

    def add(self, text: str, entries: Sequence[TokenLogprob]) -> None:
        """Take the next tokens of the answer, and the text that is shown with them."""
        for entry in self._shown.add(text, entries):
            self._append(entry.token_id, entry)

    def end(self) -> None:
        """Take the token that ended the answer, which has no text: clients count on one entry for each token."""
        for entry in self._shown.rest():
            self._append(entry.token_id, entry)

    def take(self) -> Json:
        """Those that came since the last call."""
        entries, self._entries = self._entries, []
        tokens, logprobs, tops, offsets = ([entry[i] for entry in entries] for i in range(4))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _append(self, token_id: int, entry: TokenLogprob | None) -> None:
        token, tops = self._text(token_id), None if entry is None else dict[str, float]()
        if entry is not None and tops is not None:
            for alternative, logprob in entry.top:
                tops.setdefault(self._text(alternative), bounded(logprob))  # the likelier of two with one text
            tops.setdefault(token, bounded(entry.logprob))
        self._entries.append((token, None if entry is None else bounded(entry.logprob), tops, self._offset))
        self._offset += len(self._decoder.feed(token_id)) if token_id != self._tokenizer.img_pad else 0

    def _text(self, token_id: int) -> str:
        """The text of a token; as OpenAI does, bytes that are none by themselves are spelled out."""
        data = token_bytes(self._tokenizer, token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token; none for a padding row of the model."""
    return tokenizer.token_bytes(token_id) if 0 <= token_id < tokenizer.n_vocab else b""


def prompt_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a prompt, without the pad tokens that stand for images."""
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.feed(token) for token in token_ids if token != tokenizer.img_pad) + decoder.flush()


def bounded(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(logprob, LOWEST) if not math.isnan(logprob) else LOWEST
