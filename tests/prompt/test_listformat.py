from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt import listformat

from .conftest import Oracle, answer, expected

FUNCTIONS = {
    "from_list_format": ("input",),
    "to_list_format": ("text",),
    "fetch_all_box_with_ref": ("text",),
    "fetch_latest_picture": ("response", "history"),
}


def check(name: str, cases: list[dict[str, Any]]) -> None:
    assert len(cases) >= 10
    for case in cases:
        found = answer(getattr(listformat, name), *(case[argument] for argument in FUNCTIONS[name]))
        assert found == expected(case["output"]), case


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
