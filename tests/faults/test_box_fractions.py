"""Boxes whose coordinates run from 0 to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.listformat import from_list_format
from qvl_runtime.prompt.tokenizer import Tokenizer


class TestFractions:
    """InternVL#227: coordinates from 0 to 1, which truncation would send to the corner."""

    @pytest.mark.parametrize(
        ("content", "corners"),
        [
            ("(0.12,0.34),(0.56,0.78)", (120, 340, 560, 780)),
            ("(.12,.34),(.56,.78)", (120, 340, 560, 780)),
            ("(0,0.5),(1,1)", (0, 500, 1000, 1000)),
            ("(0.0,0.0),(1.0,1.0)", (0, 0, 1000, 1000)),
            ("[0.57, 0.29, 0.1, 0.999]", (100, 290, 570, 999)),
            ("(-0.1,0.2),(0.3,0.4)", (0, 200, 300, 400)),
            ("(0,0),(1,1)", (0, 0, 1, 1)),  # whole numbers are on the grid
            ("(0.5,0.5),(1.5,1.5)", (0, 0, 1, 1)),
            ("(12.9,34),(56,78)", (12, 34, 56, 78)),
        ],
    )
    def test_of_an_answer(self, content: str, corners: tuple[int, int, int, int]) -> None:
        assert parse_boxes(f"<ref>cat</ref><box>{content}</box>") == [Box("cat", *corners)]
        if "." in content or "[" in content:
            with pytest.raises(PromptError, match="is malformed"):
                parse_boxes(f"<box>{content}</box>", strict=True)

    def test_a_quad_of_an_answer(self) -> None:
        (box,) = parse_boxes("<quad>(0.06,0.04),(0.09,0.05),(0.085,0.09),(0.056,0.08)</quad>")
        assert box.quad == ((60, 40), (90, 50), (85, 90), (56, 80))

    @pytest.mark.parametrize(
        "box",
        [[0.12, 0.34, 0.56, 0.78], (0.0, 0.0, 1.0, 1.0), [0, 0, 0.5, 1], np.array([0.1, 0.2, 0.3, 0.4], np.float32)],
    )
    def test_of_a_prompt(self, encoder: PromptEncoder, box: Any) -> None:
        for part in ({"ref": "a", "box": box}, {"box": [box]} if isinstance(box, (list, tuple)) else {"box": box}):
            with pytest.raises(PromptError, match="runs from 0 to 1; expected 0 to 1000: multiply by 1000"):
                encoder.encode([part])
        with pytest.raises(PromptError, match="multiply by 1000"):
            from_list_format([{"box": [box]}])

    @pytest.mark.parametrize("box", [[0, 0, 1, 1], np.array([0, 0, 1, 1]), [0.5, 0.5, 1.5, 20]])
    def test_of_a_prompt_on_the_grid(self, encoder: PromptEncoder, tokenizer: Tokenizer, box: Any) -> None:
        text = "".join(f"({int(x)},{int(y)})," for x, y in (box[:2], box[2:]))[:-1]
        assert tokenizer.decode(encoder.encode([{"box": box}]).token_ids) == f"<box>{text}</box>"
