"""Keys of messages and parts: what the model would not see is refused by name, what says nothing is no fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import MAX_MESSAGE, PromptError, quoted
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.tokenizer import Tokenizer
from tests.faults.message_parts import CORNERS, QUAD, RED, user


class TestParts:
    """AnyLanguageModel#167, Qwen3-VL#782, Qwen3-VL#1126."""

    @pytest.mark.parametrize(
        ("part", "key"),
        [
            ({"ref": "sign", "bbox": [1, 2, 3, 4]}, "'bbox'"),
            ({"text": "what is this?", "images": ["a.png"]}, "'images'"),
            ({"ref": "sign", "box": [1, 2, 3, 4], "color": "red"}, "'color'"),
            ({"text": "hello", "image_urls": ["http://x/a.png"]}, "'image_urls'"),
            ({"type": "text", "text": "hello", "image": RED}, "'image'"),
            ({"type": "image", "image": RED, "text": "hello"}, "'text'"),
            ({"type": "image", "image": RED, "crop": [0, 0, 1, 1]}, "'crop'"),
            ({"type": "box", "box": [1, 2, 3, 4], "quad": [CORNERS]}, "'quad'"),
            ({"type": "box", "box": [1, 2, 3, 4], "label": "sign"}, "'label'"),
            ({"type": "text", "text": "hello", 7: 1}, "7"),
            ({"type": "text", "text": "hello", "\x1b[31m" + "k" * 999: 1}, "'\\x1b[31mkkk"),
        ],
    )
    def test_unknown_keys_are_refused_by_name(self, encoder: PromptEncoder, part: dict[Any, Any], key: str) -> None:
        for prompt in ([part], [user(part)], [user("q"), {"role": "assistant", "content": [part]}, user("q")]):
            with pytest.raises(PromptError) as caught:
                encoder.encode(prompt)
            message = str(caught.value)
            assert key.replace("\x1b", "\\x1b")[:9] in message and "which would be left out" in message
            assert len(message) <= MAX_MESSAGE and message.isprintable()

    @pytest.mark.parametrize(
        "part",
        [
            {"ref": "a", "box": [1, 2, 3, 4], "quad": CORNERS},
            {"image": RED, "text": "hello"},
            {"image": RED, "image_url": "http://x/a.png"},
            {"type": "video", "video": "a.mp4"},
            {"type": "image", "url": "a.png"},
            {"type": ["text"], "text": "hello"},
            {"type": "text"},
            {"type": "box"},
            {"label": "x"},
            {},
        ],
    )
    def test_ambiguous_and_unknown_parts(self, encoder: PromptEncoder, part: dict[str, Any]) -> None:
        with pytest.raises(PromptError, match="has an invalid part with"):
            encoder.encode([part])

    @pytest.mark.parametrize(
        "more",
        [
            {"type": "text", "cache_control": {"type": "ephemeral"}},
            {"annotations": [{"type": "url_citation"}], "id": "p1", "uuid": "7", "name": "x"},
            {"image": None, "image_url": None, "video": None, "images": [], "audio": {}, "bbox": None},  # a column each
            {"image": "", "bbox": "", "hidden": False},
        ],
    )
    def test_keys_that_change_nothing(self, encoder: PromptEncoder, more: dict[str, Any]) -> None:
        assert encoder.encode([{"text": "hello", **more}]).token_ids == encoder.encode([{"text": "hello"}]).token_ids

    def test_keys_of_images(self, encoder: PromptEncoder) -> None:
        plain = encoder.encode([{"image": RED}])
        sizes = {"detail": "low", "min_pixels": 3136, "max_pixels": 10**6, "resized_height": 28, "resized_width": 28}
        assert encoder.encode([{"type": "image", "image": RED, **sizes, "text": ""}]).token_ids == plain.token_ids
        url = "data:image/png;base64,@"
        with pytest.raises(
            PromptError, match="an image_url that has 'headers', which would be left out; expected 'url'"
        ):
            encoder.encode([{"image_url": {"url": url, "headers": {"Authorization": "x"}}}])
        for harmless in ({"detail": "auto"}, {"format": "png"}, {"headers": None}):
            with pytest.raises(ValueError, match="is not base64"):  # reached, so the key was no obstacle
                encoder.encode([{"image_url": {"url": url, **harmless}, "detail": "auto"}])


class TestQuads:
    @pytest.mark.parametrize(
        "quad",
        [
            CORNERS,
            [CORNERS],
            tuple(map(tuple, CORNERS)),
            [1, 2, 30, 4, 31, 60, 2, 58],
            [[1, 2, 30, 4, 31, 60, 2, 58]],
            [1.0, 2.9, 30.2, 4.0, 31.0, 60.0, 2.5, 58.0],
            np.array(CORNERS),
            np.array(CORNERS, np.float32).reshape(8),
        ],
        ids=repr,
    )
    def test_every_form(self, encoder: PromptEncoder, tokenizer: Tokenizer, quad: Any) -> None:
        for part in ({"ref": "sign", "quad": quad}, {"type": "quad", "ref": "sign", "quad": quad}):
            encoded = encoder.encode([{"text": "Read "}, part])
            assert tokenizer.decode(encoded.token_ids) == f"Read <ref>sign</ref>{QUAD}"
            assert encoded.token_ids == tokenizer.encode(f"Read <ref>sign</ref>{QUAD}"), "the tags are tokens"

    def test_several_and_none(self, encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
        forms: list[tuple[dict[str, Any], str]] = [
            ({"quad": [CORNERS, CORNERS]}, QUAD * 2),
            ({"type": "ref", "quad": CORNERS, "ref": "a"}, f"<ref>a</ref>{QUAD}"),
            ({"ref": "a", "quad": []}, "<ref>a</ref>"),
            ({"ref": "a", "box": None, "quad": None}, "<ref>a</ref>"),
            ({"box": [[1, 2], [3, 4]]}, "<box>(1,2),(3,4)</box>"),
            ({"box": np.array([[1, 2, 3, 4], [5, 6, 7, 8]])}, "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"),
        ]
        for part, text in forms:
            assert tokenizer.decode(encoder.encode([part]).token_ids) == text

    def test_what_is_read_is_what_was_written(self, encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
        (box,) = parse_boxes(
            tokenizer.decode(encoder.encode([{"ref": "sign", "quad": CORNERS}]).token_ids), strict=True
        )
        assert box.label == "sign" and box.quad == tuple(map(tuple, CORNERS))

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"quad": CORNERS[:3]}, "expected eight numbers, x and y of four corners"),
            ({"quad": [1, 2, 3, 4]}, "expected eight numbers"),
            ({"quad": [[1, 2], 3]}, "expected eight numbers"),
            ({"quad": [[[[1, 2]]]]}, "expected eight numbers"),
            ({"quad": "1,2"}, "has a quad of type str"),
            ({"quad": 7}, "has a quad of type int"),
            (
                {"quad": [1, 2, 30, 4, 31, 6000, 2, 58]},
                "quad .* is not on the grid; expected coordinates from 0 to 1000",
            ),
            ({"quad": [-1, 2, 30, 4, 31, 60, 2, 58]}, "is not on the grid"),
            ({"quad": [1, 2, 30, 4, 31, 60, 2, float("nan")]}, "expected eight numbers"),
            (
                {"quad": [0.1, 0.2, 0.3, 0.4, 0.3, 0.6, 0.2, 0.5]},
                "runs from 0 to 1; expected 0 to 1000: multiply by 1000",
            ),
            ({"box": CORNERS}, "expected four numbers"),
            ({"box": [10**5000, 0, 1, 1]}, "box .* is not a rectangle on the grid"),
            ({"quad": [10**5000] * 8}, "is not on the grid"),
            ({"box": [float("inf"), 0, 1, 1]}, "expected four numbers"),
            ({"box": ["1", "2", "3", "4"]}, "expected four numbers"),
        ],
    )
    def test_faults(self, encoder: PromptEncoder, part: dict[str, Any], message: str) -> None:
        with pytest.raises(PromptError, match=message):
            encoder.encode([part])

    def test_deep_nesting(self, encoder: PromptEncoder) -> None:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for part in ({"quad": deep}, {"box": deep}, {"text": deep}, {"text": "x", "more": deep}):
            with pytest.raises(PromptError):
                encoder.encode([part])
        assert quoted(deep) == "a value of type list"
        while deep:  # unwound by hand: the interpreter frees nested lists by recursion
            (deep,) = deep


class TestMessages:
    """vllm#21089, lmstudio#261, mistral-common#324."""

    HARMLESS: Sequence[dict[str, Any]] = (
        {"name": "ann", "id": "msg_1", "type": "message", "status": "completed"},
        {"refusal": None, "annotations": [], "audio": None, "tool_calls": None, "function_call": None},
        {"tool_calls": [], "images": [], "reasoning_content": "hm", "reasoning": "hm"},
        {"annotations": [{"type": "url_citation"}], "cache_control": {"type": "ephemeral"}},
        {"metadata": {"title": None}, "options": [{"value": "x"}]},  # Gradio keeps these
    )

    @pytest.mark.parametrize("more", HARMLESS)
    def test_keys_that_change_nothing(self, encoder: PromptEncoder, more: dict[str, Any]) -> None:
        def messages(**keys: Any) -> list[dict[str, Any]]:
            answer = {"role": "assistant", "content": "a", **keys}
            return [{"role": "system", "content": "s", **keys}, user("q", **keys), answer, user("r", **keys)]

        assert encoder.encode(messages(**more)).token_ids == encoder.encode(messages()).token_ids

    @pytest.mark.parametrize(
        ("more", "key"),
        [
            ({"images": ["a.png"]}, "'images'"),
            ({"tool_calls": [{"id": "1"}]}, "'tool_calls'"),
            ({"function_call": {"name": "f"}}, "'function_call'"),
            ({"audio": {"id": "1"}}, "'audio'"),
            ({"refusal": "I cannot"}, "'refusal'"),
            ({"files": ["a.pdf"], "image": RED, "video": "v", "x": 1}, "'files', 'image', 'video',"),
            ({"text": "instead of content"}, "'text'"),
        ],
    )
    def test_unknown_keys_are_refused_by_name(self, encoder: PromptEncoder, more: dict[str, Any], key: str) -> None:
        answer = {"role": "assistant", "content": "a"}
        for messages in (
            [user("q", **more)],
            [user("q"), answer | more, user("r")],
            [user("q"), answer, user("r", **more)],
        ):
            with pytest.raises(
                PromptError, match=f"^message [012] .* has {key} ?which would be left out; expected 'role'|{key}"
            ):
                encoder.encode(messages)

    @pytest.mark.parametrize("answer", [{"content": None}, {}, {"content": ""}, {"content": None, "tool_calls": []}])
    def test_an_assistant_without_content_said_nothing(
        self, encoder: PromptEncoder, tokenizer: Tokenizer, answer: dict[str, Any]
    ) -> None:
        encoded = encoder.encode([user("q"), {"role": "assistant", **answer}, user("r")])
        text = "user\nq<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nr<|im_end|>"
        assert text in tokenizer.decode(encoded.token_ids)

    def test_others_need_content(self, encoder: PromptEncoder) -> None:
        for message in ({"role": "user"}, {"role": "user", "content": None}, {"role": "system", "content": None}):
            with pytest.raises(PromptError, match="has content of type NoneType"):
                encoder.encode([message, user("q")] if message["role"] == "system" else [message])

    @pytest.mark.parametrize("role", ["tool", "developer", ["user"], None, "u" * 10**6, "\x1b[2J"])
    def test_unknown_roles(self, encoder: PromptEncoder, role: Any) -> None:
        with pytest.raises(PromptError, match="has an unknown role; expected system, user or assistant") as caught:
            encoder.encode([{"role": role, "content": "x"}])
        assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


@pytest.mark.cpu
def test_what_an_engine_answers() -> None:
    engine = Engine(device="cpu", kv_cache_bytes=2**22)
    params = SamplingParams(max_tokens=4, temperature=0)
    history = [user({"image": RED}, {"text": "q"}), {"role": "assistant", "content": None, "refusal": None}, user("r")]
    assert engine.chat(history, params).token_ids
    assert engine.generate([[{"ref": "sign", "quad": CORNERS}]], params)[0].token_ids
    with pytest.raises(PromptError, match="'images', which would be left out"):
        engine.chat([user("q", images=["a.png"])], params)
