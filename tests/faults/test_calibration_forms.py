"""Calibration files in the forms of other trainers; whatever would be lost is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.conversations import conversation_segment, read_conversations
from qvl_runtime.prompt.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)}, n_queries=4)
TURNS = [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "That."}]
PLAIN = {"conversations": TURNS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def read(folder: Path, text: str) -> list[Any]:
    (folder / "data.json").write_text(text, encoding="utf-8")
    return [conversation.messages for conversation in read_conversations(folder / "data.json")]


OTHER_FORMS: dict[str, dict[str, Any]] = {
    "human and gpt": {
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}],
        "id": "0001",
        "source": "web",
    },
    "messages": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]},
    "extra keys of turns": {"conversations": [{**TURNS[0], "loss": False}, {**TURNS[1], "weight": 1}]},
    "empty lists": {"conversations": TURNS, "images": [], "videos": None, "tools": ""},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_names_of_the_same(folder: Path, form: str) -> None:
    assert read(folder, json.dumps([OTHER_FORMS[form]])) == read(folder, json.dumps([PLAIN]))


@pytest.mark.parametrize("text", ["{}\n{}", "{}\r\n\r\n{}\n\n", "\n{} {}"])
def test_one_record_a_line(folder: Path, text: str) -> None:
    lines = text.replace("{}", json.dumps(PLAIN))
    assert read(folder, lines) == read(folder, json.dumps([PLAIN, PLAIN]))


def test_images_beside_the_texts(folder: Path) -> None:
    """LLaVA has one `image`, LLaMA-Factory and ms-swift have `images`; <image> stands where each is."""
    expected = [[("user", f"Picture 1:<img>{folder / 'a.png'}</img>\nWhat?"), ("assistant", "That.")]]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    for beside in ({"image": "a.png"}, {"images": ["a.png"]}, {"images": "a.png"}):
        assert [list(map(tuple, m)) for m in read(folder, json.dumps([{**beside, "conversations": turns}]))] == expected
    several = [{"from": "human", "value": "<image><image> same?"}, {"from": "gpt", "value": "No, <image> is."}]
    record = {"images": ["a.png", "b.png", "https://example.org/c.png"], "conversations": several}
    ((user, assistant),) = read(folder, json.dumps([record]))
    assert user.text == f"Picture 1:<img>{folder / 'a.png'}</img>Picture 2:<img>{folder / 'b.png'}</img> same?"
    assert assistant.text == "No, Picture 3:<img>https://example.org/c.png</img> is."
    assert len(conversation_segment(TOKENIZER, read_conversations(folder / "data.json")[0]).slots) == 3


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]},
        {"conversations": TURNS, "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
                      {"role": "assistant", "content": "That."}]},
    ],
)  # fmt: skip
def test_system_texts(folder: Path, record: dict[str, Any]) -> None:
    (folder / "data.json").write_text(json.dumps([record]))
    (conversation,) = read_conversations(folder / "data.json")
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
    expected = TOKENIZER.encode(text + "<|im_start|>assistant\nThat.<|im_end|>\n")
    assert conversation_segment(TOKENIZER, conversation).ids == expected


GOOD = json.dumps(PLAIN)


def turn(value: Any, **more: Any) -> str:
    return json.dumps([PLAIN, {"conversations": [{"from": "user", "value": value}], **more}], indent=1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"[{GOOD}]\nhello", r"line 2 has 'hello' after the end of the list"),
        (f"[{GOOD}]\n\n[{GOOD}]", r"line 3 has .* after the end"),
        (f"[{GOOD},", "ends inside its list"),
        (f"{GOOD}\n{GOOD[:30]}", r"line 2 \(record 2\) is not JSON"),
        (f"{GOOD}\nhello", r"line 2 \(record 2\) is not JSON"),
        (f"{GOOD}\n5", r"line 2 \(record 2\) has int"),
        ('{"data": [1]}', "has 'data'; expected a JSON list of conversations, or one on each line"),
        ("[" * 100_000, r"line 1 \(record 1\) is nested more than 64 levels deep"),
        (turn("see <img>a.png"), r"line 14 \(record 2\) has '<img>a.png' without </img>"),
        (turn("<img>a.png</img> and <img>b.png"), r"\(record 2\) has '<img>b.png' without </img>"),
        (turn("<image> what?", images=["a.png", "b.png"]), r"\(record 2\) has 2 images and 1 times <image>"),
        (turn("<image><image> what?", image="a.png"), r"\(record 2\) has 1 images and 2 times <image>"),
        (turn("what?", image="a.png"), r"\(record 2\) has 1 images and 0 times <image>"),
        (turn("<image> what?", images=["c.png"]), r"\(record 2\) names the image 'c.png'"),
        (turn("<image> what?", images=[{"path": "a.png"}]), r"\(record 2\) has the images"),
        (turn("what?", videos=["a.mp4"]), r"\(record 2\) has 'videos', which is not read"),
        (turn("what?", system=5), r"\(record 2\) has the system text 5"),
        (turn(["what?"]), r"\(record 2\) has the turn"),
        (turn("<img>" + "x" * 300 + "</img>"), r"\(record 2\) names the image 'xxx"),
        (turn("<img>a\x00b</img>"), r"\(record 2\) names the image"),
        ('[{"conversations": [{"from": "user", "value": "?", "images": ["a.png"]}]}]', "has 'images' in a turn"),
        ('[{"conversations": [{"from": "user", "value": "?"}, {"from": "system", "value": "s"}]}]', "at the start"),
        ('[{"conversations": [{"from": "system", "value": "s"}]}]', "has a system text alone"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_place(folder: Path, text: str, fault: str) -> None:
    with pytest.raises(PromptError, match=fault) as caught:
        read(folder, text)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
