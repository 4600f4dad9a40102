from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt import listformat

from .conftest import Oracle, answer, expected


def fetch_latest_picture(response: str, history: Sequence[tuple[str, str]] | None) -> str | None:
    """As the original: the path of the last image in the response, else in the newest question that has one."""
    for text in (response, *(question for question, _ in reversed(history or ()))):
        images = [part["image"] for part in listformat.to_list_format(text) if "image" in part]
        if images:
            return images[-1]
    return None


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "from_list_format": (listformat.from_list_format, ("input",)),
    "to_list_format": (listformat.to_list_format, ("text",)),
    "fetch_all_box_with_ref": (listformat.fetch_all_box_with_ref, ("text",)),
    "fetch_latest_picture": (fetch_latest_picture, ("response", "history")),
}


def check(name: str, cases: list[dict[str, Any]]) -> None:
    assert len(cases) >= 10
    for case in cases:
        function, arguments = FUNCTIONS[name]
        assert answer(function, *(case[argument] for argument in arguments)) == expected(case["output"]), case


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_the_original(name: str, golden_local: Path) -> None:
    check(name, json.loads((golden_local / "list_format.json").read_text(encoding="utf-8"))[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_the_oracle(name: str, oracle: Oracle) -> None:
    check(name, oracle.tokens[name])


def test_there_and_back() -> None:
    text = "see Picture 1:<img>cat.jpg</img>\n<ref>the 猫</ref><box>(1,2),(3,4)</box>."
    parts = listformat.to_list_format(text)
    assert parts == [
        {"text": "see Picture 1:"},
        {"image": "cat.jpg"},
        {"text": "\n"},
        {"ref": "the 猫"},
        {"box": "(1,2),(3,4)"},
        {"text": "."},
    ]


@pytest.mark.parametrize("box", [[1, 2, 3], "1234", [1, 2, 3, "x"], [1, 2, 3, float("inf")], 7])
def test_boxes_that_cannot_be_written(box: object) -> None:
    with pytest.raises(PromptError, match=r"expected four numbers"):
        listformat.from_list_format([{"box": [box]}])
