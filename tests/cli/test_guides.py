"""The options for what an answer follows become sampling parameters, with the content of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.cli.options import SamplingOptions
from qvl_runtime.errors import ConstraintError

pytestmark = pytest.mark.unit


def test_files_and_texts(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "integer"}', "utf-8")
    lark.write_text('start: "a"', "utf-8")
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"json_schema": str(schema)}, '{"type": "integer"}'),
        ({"grammar": str(lark)}, 'start: "a"'),
        ({"regex": "[ab]+"}, "[ab]+"),
        ({"choice": ["yes", "no"]}, ("yes", "no")),
        ({"json_object": True}, True),
        ({"boxes": "force"}, "force"),
    ]
    for options, want in cases:
        (name,) = options
        assert getattr(SamplingOptions(**options).params(), name) == want
    assert json.loads(SamplingOptions(json_schema=str(schema)).params().json_schema or "") == {"type": "integer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": "/nowhere/schema.json"}, "--json-schema is '/nowhere/schema.json', which does not exist"),
        ({"boxes": "all"}, "boxes is 'all'"),
        ({"regex": "a", "json_object": True}, "json_object and regex are set"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        SamplingOptions(**options).params()
