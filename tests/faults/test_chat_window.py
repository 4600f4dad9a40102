"""A chat with an image a turn keeps what fits, images counted, rather than failing at the turn after the limit."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime import AsyncEngine, Engine, SamplingParams
from qvl_runtime.cli.chat import ChatSession, converse
from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=2, temperature=0)


def image(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number, 9 * number % 256, 0))


def turns(count: int, images_each: int = 1) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(count):
        parts = [{"image": image(turn * images_each + i)} for i in range(images_each)]
        messages += [{"role": "user", "content": [*parts, {"text": f"q{turn}"}]}, {"role": "assistant", "content": "a"}]
    return messages[:-1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([byte]): byte for byte in range(256)}, n_queries=4)


class TestWindow:
    """antirez/ds4#1080, charmbracelet/crush#2604, openclaw#19099."""

    @pytest.mark.parametrize("count", [1, 15, 16, 17, 18, 40])
    def test_a_turn_and_an_image(self, tokenizer: Tokenizer, count: int) -> None:
        encoded = PromptEncoder(tokenizer, 28).encode(turns(count))
        kept = min(count, 16)
        assert (len(encoded.spans), encoded.dropped_turns) == (kept, count - kept)
        seen = [int(span.image.rgb[0, 0, 0]) for span in encoded.spans]
        assert seen == list(range(count - kept, count)), "the newest"
        text = tokenizer.decode(encoded.token_ids)
        assert f"Picture {count}:" in text and f"Picture {count - kept + 1}:" in text, "numbers stay those of the chat"
        assert "Picture 1:" not in text or count <= 16

    @pytest.mark.parametrize(("each", "limit", "kept"), [(2, 5, 2), (3, 5, 1), (5, 5, 1), (2, 6, 3)])
    def test_turns_are_dropped_whole(self, tokenizer: Tokenizer, each: int, limit: int, kept: int) -> None:
        encoder = PromptEncoder(tokenizer, 28, limits=ImageLimits(max_images=limit))
        encoded = encoder.encode(turns(4, each))
        assert (len(encoded.spans), encoded.dropped_turns) == (kept * each, 4 - kept)

    def test_no_gap_in_the_history(self, tokenizer: Tokenizer) -> None:
        """Older turns without images are not kept when a newer one is dropped."""
        messages = [*turns(1, 0), {"role": "assistant", "content": "a"}, *turns(2, 2)]
        encoded = PromptEncoder(tokenizer, 28, limits=ImageLimits(max_images=3)).encode(messages)
        assert (len(encoded.spans), encoded.dropped_turns) == (2, 2)

    def test_text_turns_stay_when_no_image_may_come(self, tokenizer: Tokenizer) -> None:
        encoder = PromptEncoder(tokenizer, 28, limits=ImageLimits(max_images=0))
        assert encoder.encode(turns(5, 0)).dropped_turns == 0
        encoded = encoder.encode([*turns(1), {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}])
        assert (len(encoded.spans), encoded.dropped_turns) == (0, 1)

    def test_dropped_images_are_not_read(self, tokenizer: Tokenizer) -> None:
        messages = turns(17)
        messages[0]["content"][0] = {"image": "missing.png"}
        assert PromptEncoder(tokenizer, 28).encode(messages).dropped_turns == 1

    def test_one_question_over_the_limit_is_refused(self, tokenizer: Tokenizer) -> None:
        encoder = PromptEncoder(tokenizer, 28)
        question = turns(1, 17)
        for prompt in (question, question[0]["content"], [*turns(3), {"role": "assistant", "content": "a"}, *question]):
            with pytest.raises(
                PromptError, match="17 images, over the limit of 16: ask about fewer at a time, or raise max_"
            ):
                encoder.encode(prompt)
        assert len(PromptEncoder(tokenizer, 28, limits=ImageLimits(max_images=17)).encode(question).spans) == 17

    def test_a_base_model_has_only_the_question(self, tokenizer: Tokenizer) -> None:
        encoder = PromptEncoder(tokenizer, 28, chat_format="raw", limits=ImageLimits(max_images=1))
        assert len(encoder.encode(turns(3)).spans) == 1


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu", max_images=2)


@pytest.mark.cpu
class TestEngines:
    def test_the_note_says_how_many(self, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            completion = engine.chat(turns(4), PARAMS)
        assert completion.usage.images == 2
        assert "the 2 oldest turns of the conversation do not fit and are left out" in caplog.text
        pieces = list(engine.chat(turns(4), PARAMS, stream=True))
        assert pieces[-1].completion is not None and pieces[-1].completion.token_ids == completion.token_ids
        short = [{**turns(4)[4], "content": [{"image": image(2)}, {"text": "q2"}]}]
        assert engine.chat([*short, *turns(4)[5:]], PARAMS).usage.images == 2

    def test_async(self, engine: Engine) -> None:
        async def ask() -> int:
            async with AsyncEngine(engine) as server:
                return (await server.generate(turns(5), PARAMS)).usage.images

        assert asyncio.run(ask()) == 2

    def test_at_the_terminal(self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image(3).save(tmp_path / "a.png")
        lines = f"/image {tmp_path}/a.png\nwhat is it?\n" * 4
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        session = ChatSession(engine, PARAMS)
        assert converse(session) == 0
        assert session.last is not None and session.last.usage.images == 2
