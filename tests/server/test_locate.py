"""POST /v1/locate over HTTP: boxes with their scores as the engine has them, given boxes, and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Live

pytestmark = pytest.mark.cpu


def test_boxes_are_found_and_scored(live: Live, demo_url: str) -> None:
    status, found = ask(live, image_url={"url": demo_url}, phrase="cat", k=2, question="Box the {}.")
    assert status == 200 and found["object"] == "locate" and 0 <= found["presence"] <= 1
    best = found["boxes"][0]
    assert 1 <= len(found["boxes"]) <= 2 and best["label"] == "cat" and len(best["pixels"]) == 4
    assert 0 < best["mass"] <= 1 and 0 < best["details"]["normalized"] <= 1 and len(best["details"]["spread"]) == 4
    corners = [best["box"], [0, 0, 1000, 1000]]
    status, scored = ask(live, image_url={"url": demo_url}, phrase="cat", boxes=corners, question="Box the {}.")
    assert status == 200 and [box["box"] for box in scored["boxes"]] == corners
    first, second = (box["details"]["logprob"] for box in scored["boxes"])
    assert first > second and first == pytest.approx(best["details"]["logprob"], abs=0.05)


def test_boxes_of_an_answer_have_their_details(live: Live, demo_url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": demo_url}}, {"type": "text", "text": "Box the cat."}]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "qvl": {"boxes": "force"}}
    answer = live.post("/v1/chat/completions", body).json()
    (box, *_) = answer["choices"][0]["message"]["qvl"]["boxes"]
    assert 0 < box["details"]["presence"] <= 1 and box["details"]["confidence"] is not None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"phrase": None}, "phrase"),
        ({"phrase": "  "}, "phrase"),
        ({"k": 33}, "k"),
        ({"boxes": [[1, 2, 3]]}, "boxes[0]"),
        ({"boxes": [[9, 2, 3, 4]]}, "boxes"),
        ({"boxes": [[1, 2, 3, 4]], "k": 2}, "k"),
        ({"image_url": {"url": "file:///etc/passwd"}}, "image_url"),
        ({"model": "other"}, "model"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_wrong_names_its_field(live: Live, demo_url: str, change: dict[str, Any], param: str) -> None:
    status, answer = ask(live, **{"image_url": {"url": demo_url}, "phrase": "cat"} | change)
    assert status == (404 if param == "model" else 400) and answer["error"]["param"] == param, answer


def ask(live: Live, **body: Any) -> tuple[int, Any]:
    answer = live.post("/v1/locate", body)
    return answer.status, answer.json()
