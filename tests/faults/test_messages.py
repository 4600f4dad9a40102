"""A message is one bounded line, whatever a stranger put into what it quotes."""

from __future__ import annotations

import pytest

from qvl_runtime.errors import MAX_MESSAGE, MAX_QUOTED, CheckpointError, PromptError, QVLError, quoted


@pytest.mark.parametrize(
    "found", ["a\nb", "\x1b[31mred", "\x00", "line\r\nforged: ok", "\u2028", "\u202etxt", "\ud800", "\x9b2J"]
)
def test_control_characters_are_escaped(found: str) -> None:
    message = str(PromptError(f"the prompt has {found}"))
    assert message.isprintable()
    assert message.startswith("the prompt has ")
    message.encode("utf-8")  # a log can write it


@pytest.mark.parametrize("found", ["x" * 10**6, "\x00" * 10**6, "\n" * 5000])
def test_a_message_is_bounded(found: str) -> None:
    message = str(CheckpointError(f"found {found}; expected a name: rename it"))
    assert len(message) <= MAX_MESSAGE
    assert message.startswith("found ") and message.endswith("expected a name: rename it")


def test_plain_messages_stay() -> None:
    assert str(QVLError("the image 猫.png has 3 × 4 pixels")) == "the image 猫.png has 3 × 4 pixels"
    assert str(QVLError()) == ""


@pytest.mark.parametrize("value", ["a" * 10**7, b"\x00" * 10**7, list(range(1000)), {"a": "b" * 500}, "\x1b]0;\x07"])
def test_quoted_values_are_bounded(value: object) -> None:
    assert len(quoted(value)) <= MAX_QUOTED
    assert quoted(value).isprintable()


def test_short_values_are_quoted_whole() -> None:
    assert quoted("cat") == "'cat'"
    assert quoted(b"PNG") == "b'PNG'"
    assert quoted(3.5) == "3.5"
