"""The other ways to say a prompt: strings with tags, token ids with images, and lists of parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import ImageError, PromptError
from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.tokenizer import Tokenizer

from .chat import BLUE, RED, SIZE, data_url, spell
from .conftest import Oracle


class TestStrings:
    def test_tags_are_honoured(self, toy: Tokenizer, encoder: PromptEncoder, tmp_path: Path) -> None:
        RED.save(tmp_path / "red.png")
        encoded = encoder.encode(f"a<img>{tmp_path}/red.png</img><ref>x</ref><|im_end|>")
        pads = [toy.img_pad] * 4
        assert encoded.token_ids == [
            *[97, toy.img_start, *pads, toy.img_end],
            *[toy.ref_start, 120, toy.ref_end, toy.im_end],
        ]
        (span,) = encoded.spans
        assert (span.start, span.length, span.image.width, span.image.height) == (2, 4, 30, 20)
        assert span.image.rgb.shape == (SIZE, SIZE, 3)

    def test_data_url(self, encoder: PromptEncoder) -> None:
        assert encoder.encode(f"<img>{data_url(RED)}</img>").spans[0].image.width == 30

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "empty"),
            ([], "empty"),
            ("<img>a.png", "not closed"),
            (b"bytes", "type bytes"),
            (7, "type int"),
            ({"text": "x"}, "dict with 'text'"),
            ({"token_ids": [1], "image": []}, "dict with 'token_ids', 'image'"),
            ([1, 2, 3], "part of type int"),
            ({"token_ids": []}, "empty"),
            ({"token_ids": [1.5]}, "whole numbers"),
            ({"token_ids": [-1]}, "holds -1"),
            ({"token_ids": [10**6]}, "holds 1000000"),
            ({"token_ids": [97], "images": [RED]}, "0 image spans, but images has 1"),
        ],
    )
    def test_faults(self, encoder: PromptEncoder, prompt: Any, message: str) -> None:
        with pytest.raises(PromptError, match=message) as caught:
            encoder.encode(prompt)
        assert "\n" not in str(caught.value)


class TestTokenIds:
    def test_what_stands_in_a_span_gives_way(self, toy: Tokenizer, encoder: PromptEncoder) -> None:
        short = [97, toy.img_start, toy.img_end, 98, toy.img_start, *range(9), toy.img_end]
        encoded = encoder.encode({"token_ids": short, "images": [RED, BLUE]})
        pads = [toy.img_pad] * 4
        assert encoded.token_ids == [97, toy.img_start, *pads, toy.img_end, 98, toy.img_start, *pads, toy.img_end]
        assert [(span.start, span.image.width) for span in encoded.spans] == [(2, 30), (9, 20)]

    def test_an_open_span(self, toy: Tokenizer, encoder: PromptEncoder) -> None:
        with pytest.raises(PromptError, match="at index 1 of token_ids has no end"):
            encoder.encode({"token_ids": [97, toy.img_start, 98], "images": [RED]})

    def test_without_images(self, encoder: PromptEncoder) -> None:
        assert encoder.encode({"token_ids": (1, 2)}).token_ids == [1, 2]

    def test_ids_of_the_original_with_spelled_paths(self, oracle: Oracle) -> None:
        text = "Picture 1:<img>pics/a.jpg</img>\nDescribe."
        golden = spell(oracle.tokenizer, oracle.tokenizer.encode_tagged(text))
        encoded = PromptEncoder(oracle.tokenizer, SIZE).encode({"token_ids": golden, "images": [RED]})
        assert encoded.token_ids == oracle.tokenizer.encode(text)


class TestParts:
    def test_like_from_list_format(self, toy: Tokenizer, encoder: PromptEncoder) -> None:
        parts = [{"image": RED}, {"text": "the "}, {"image": BLUE}, {"ref": "狗", "box": [[1, 2, 3, 4], [5, 6, 7, 8]]}]
        encoded = encoder.encode([*parts, {"text": "<box>"}])  # type: ignore[list-item]
        text = "Picture 1:<img></img>\nthe Picture 2:<img></img>\n<ref>狗</ref>"
        text += "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
        assert toy.decode(encoded.token_ids) == text + "<box>"
        assert encoded.token_ids == toy.encode(text) + toy.encode("<box>", "none")
        assert len(encoded.spans) == 2

    def test_a_lone_ref_and_a_flat_box(self, toy: Tokenizer, encoder: PromptEncoder) -> None:
        encoded = encoder.encode([{"ref": "<img>x</img>"}, {"box": (1.9, 2, 3, 4)}])
        assert toy.decode(encoded.token_ids) == "<ref><img>x</img></ref><box>(1,2),(3,4)</box>"
        assert encoded.spans == ()

    def test_too_many_images(self, toy: Tokenizer) -> None:
        strict = PromptEncoder(toy, SIZE, limits=ImageLimits(max_images=1))
        with pytest.raises(PromptError, match="2 images, over the limit of 1"):
            strict.encode([{"image": RED}, {"image": "never opened"}])

    def test_a_broken_image_is_named(self, encoder: PromptEncoder) -> None:
        with pytest.raises(ImageError, match=r"^image 2 \(5 bytes\)"):
            encoder.encode([{"image": RED}, {"image": b"hello"}])
