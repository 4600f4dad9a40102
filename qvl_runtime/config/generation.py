"""The sampling defaults of a checkpoint: `generation_config.json`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import (
    LARGEST_FLOAT32,
    LARGEST_INT,
    SMALLEST_FLOAT32,
    read_fields,
    read_json,
    require_choice,
    require_positive,
)
from qvl_runtime.config.generation_keys import refuse_unsupported, unused_keys
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.reading.regular_files import is_there

_log = logging.getLogger("qvl_runtime")
_FILE = "generation_config.json"
_LISTED = ("eos_token_id", "pad_token_id", "stop_words_ids", "stop_strings", "suppress_tokens", "bad_words_ids")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The content of `generation_config.json`; defaults are the released values, for a checkpoint without the file.

    Token ids of the file are those of the vocabulary: `check_ids` compares them with its size.
    """

    chat_format: str = "chatml"  # "raw" for the base model
    eos_token_id: int | tuple[int, ...] | None = None  # each ends an answer, as the tokenizer's <|endoftext|> does
    pad_token_id: int | tuple[int, ...] | None = None  # read for completeness: nothing is padded
    max_window_size: int = 6144  # tokens of system text and history in a chat
    max_new_tokens: int = 512
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 0.5
    repetition_penalty: float = 1.0
    max_time: float | None = None  # seconds, the default of timeout_s
    stop_words_ids: tuple[tuple[int, ...], ...] = ()  # each ends an answer
    stop_strings: tuple[str, ...] = ()  # each ends an answer
    suppress_tokens: tuple[int, ...] = ()  # never generated
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # of one token each: never generated

    def __post_init__(self) -> None:
        require_choice("chat_format", self.chat_format, ("chatml", "raw"))
        require_positive(self, "", "max_window_size", "max_new_tokens")
        for name, least, most in (
            ("temperature", 0, LARGEST_FLOAT32),
            ("top_k", 0, LARGEST_INT),
            ("top_p", SMALLEST_FLOAT32, 1),
            ("repetition_penalty", SMALLEST_FLOAT32, LARGEST_FLOAT32),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{_FILE} has {name} {quoted(value)}; expected {least:.2g} to {most:.2g}")
        if self.max_time is not None:
            require_positive(self, "", "max_time")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of `eos_token_id`, and stop words of one token."""
        eos = self.eos_token_id
        given = () if eos is None else (eos,) if isinstance(eos, int) else eos
        return (*given, *(word[0] for word in self.stop_words_ids if len(word) == 1))

    @property
    def end_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Stop words of several tokens."""
        return tuple(word for word in self.stop_words_ids if len(word) > 1)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens that are never generated: those of `suppress_tokens` and `bad_words_ids`."""
        return (*self.suppress_tokens, *(word[0] for word in self.bad_words_ids))

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read a folder's `generation_config.json`; without one, the released defaults."""
        path = Path(folder) / _FILE
        return cls.from_dict(read_json(path)) if is_there(path) else cls()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GenerationDefaults:
        """Read a `generation_config.json`, from which transformers omits values that equal its own defaults.

        Raises `ConfigError` for a key that would change answers and is not implemented.
        """
        implied = {"do_sample": False, "top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
        present = {key: _whole(value) for key, value in raw.items() if value is not None}
        values = read_fields(cls, implied | present, _FILE, skip=_LISTED)
        refuse_unsupported(raw, values["do_sample"])
        if unused := unused_keys(raw, frozenset(field.name for field in fields(cls))):
            _log.warning("%s has %s, not used here", _FILE, ", ".join(unused))
        strings = present.get("stop_strings", ())
        strings = (strings,) if isinstance(strings, str) else strings
        if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
            raise ConfigError(f"{_FILE} has stop_strings {quoted(strings)}; expected strings of at least one character")
        defaults = cls(
            **values,
            eos_token_id=_one_or_more(present, "eos_token_id"),
            pad_token_id=_pad(present.get("pad_token_id")),
            stop_words_ids=_sequences(present, "stop_words_ids"),
            stop_strings=tuple(strings),
            suppress_tokens=_ids(present.get("suppress_tokens", []), "suppress_tokens"),
            bad_words_ids=_sequences(present, "bad_words_ids"),
        )
        if longer := [word for word in defaults.bad_words_ids if len(word) > 1]:
            raise ConfigError(
                f"{_FILE} has the bad_words_ids {quoted(list(longer[0]))}; supported are words of one token, as a "
                "longer one would need its first tokens back: remove it from the file to get answers without that rule"
            )
        return defaults

    def check_ids(self, vocabulary: int) -> None:
        """Raise `ConfigError` for a token id that a vocabulary of this size does not have."""
        words = [token for word in self.stop_words_ids for token in word]
        for token in (*self.end_ids, *words, *self.suppressed_ids):
            if not 0 <= token < vocabulary:
                raise ConfigError(
                    f"{_FILE} has the token id {token}; the ids of this model end at {vocabulary - 1}: take both files "
                    "from one checkpoint"
                )

    def rules(self, usual: Collection[int], ends: bool = True) -> list[str]:
        """What the file adds to every answer: "ends at id 1106", "stop 'X'".

        usual: ids that end answers anyway; ends: without `ignore_eos`.
        """
        rules = []
        if ends:
            rules += [f"ends at id {token}" for token in dict.fromkeys(self.end_ids) if token not in usual]
            rules += [f"ends at ids {quoted(list(word))}" for word in self.end_sequences]
            rules += [f"stop {quoted(text)}" for text in self.stop_strings]
        if self.suppressed_ids:
            rules.append(f"{len(set(self.suppressed_ids))} suppressed ids")
        return rules


def _whole(value: Any) -> Any:
    """A number like 50.0 as 50: `read_fields` makes it a float again where one is due."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _ids(value: Any, key: str) -> tuple[int, ...]:
    """A list of token ids."""
    ids = value if isinstance(value, list) else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise ConfigError(f"{_FILE} has {key} {quoted(value)}; expected token ids, whole numbers")
    return tuple(ids)


def _one_or_more(present: Mapping[str, Any], key: str) -> int | tuple[int, ...] | None:
    """One id, also where it stands alone in a list; several; or None."""
    ids = _ids(present.get(key, []), key)
    return ids[0] if len(ids) == 1 else ids or None


def _pad(value: Any) -> int | tuple[int, ...] | None:
    """As it stands, whole numbers alone: a wrong one changes nothing."""
    if isinstance(value, list):
        return tuple(token for token in value if isinstance(token, int))
    return value if isinstance(value, int) else None


def _sequences(present: Mapping[str, Any], key: str) -> tuple[tuple[int, ...], ...]:
    """A list of lists of token ids."""
    value = present.get(key, [])
    if not isinstance(value, list) or not all(isinstance(word, list) and word for word in value):
        raise ConfigError(f"{_FILE} has {key} {quoted(value)}; expected lists of token ids, as [[151643]]")
    return tuple(_ids(word, key) for word in value)
