"""Qwen-VL's fine-tuning format: read, refused with its place, and put into ChatML; and the built-in conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.conversations import conversation_segment, read_conversations
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.records import Conversation, Message
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.quantize.sample_conversations import sample_conversations

pytestmark = pytest.mark.unit
TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)}, n_queries=4)


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def record(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"id": "x", "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]}


def test_images_are_found_next_to_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    url = "https://example.org/b.png"
    file = write(tmp_path / "data.json", [record(f"Picture 1: <img>a.png</img>\n<img>{url}</img>", "好"), record("hi")])
    first, second = read_conversations(file)
    question = f"Picture 1: <img>{tmp_path / 'a.png'}</img>\n<img>{url}</img>"
    assert first.messages == (Message("user", question), Message("assistant", "好"))
    assert "line 2 (record 1)" in first.where and "(record 2)" in second.where


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected a JSON list"),
        ('{"conversations": []}', "expected a JSON list"),
        ("[]", "holds no conversation"),
        ('[{"id": 1}]', r"line 1 \(record 1\) has 'id'; expected an object with a list of 'conversations'"),
        ('[\n\n"a"]', r"line 3 \(record 1\) has str"),
        ('[{"conversations": [{"from": "narrator", "value": "a"}]}]', "expected {'from': 'user' or 'assistant'"),
        ('[{"conversations": [{"from": "user", "value": 1}]}]', "expected {'from'"),
        ('[{"conversations": [{"from": "user", "value": "a"}]},\n {"conv', r"line 2 \(record 2\) is not JSON"),
        ('[{"conversations": [{"from": "user", "value": "a"}]}\n {}]', "expected a comma"),
        ('[{"conversations": [{"from": "user", "value": "a"}]}', "expected a comma"),
        ('[\n{"conversations": [{"from": "user", "value": "<img>no.png</img>"}]}]', r"line 2 \(record 1\).*'no.png'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(PromptError, match=fault):
        read_conversations(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none.json cannot be read"):
        read_conversations(tmp_path / "none.json")


def test_the_segment_is_the_original_fine_tuning_template() -> None:
    messages = (Message("user", "<img>a.png</img>?"), Message("assistant", "<ref>a</ref>"))
    segment = conversation_segment(TOKENIZER, Conversation("here", messages), system="S")
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<img>a.png</img>?<|im_end|>\n"
    assert segment.ids == TOKENIZER.encode(text + "<|im_start|>assistant\n<ref>a</ref><|im_end|>\n")
    (slot,) = segment.slots
    assert slot.source == "a.png" and segment.ids[slot.start] == TOKENIZER.img_pad


def test_a_broken_tag_names_the_record() -> None:
    with pytest.raises(PromptError, match="record 7: <img>"):
        conversation_segment(TOKENIZER, Conversation("record 7", (Message("user", "<img>a"),)))


def test_built_in_conversations_can_all_be_read_and_do_not_change() -> None:
    conversations = sample_conversations(12)
    assert conversations == sample_conversations(12)
    segments = [conversation_segment(TOKENIZER, conversation) for conversation in conversations]
    assert [len(segment.slots) for segment in segments] == [1, 1, 1, 0] * 3
    for segment in segments:
        for slot in segment.slots:
            assert load_image(slot.source, 28).width == 448
