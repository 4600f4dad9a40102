from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.streaming import StopMatcher, StreamDecoder
from qvl_runtime.prompt.tokenizer import Tokenizer

from .conftest import toy_ranks

TOY = Tokenizer(toy_ranks(), n_queries=4)


def stream(stops: list[str], pieces: list[str]) -> tuple[str, bool, str | None]:
    """Everything a matcher lets through, whether it stopped, and at what."""
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        emit, stopped = matcher.feed(piece)
        shown += emit
        if stopped:
            return shown, True, matcher.matched
    return shown + matcher.flush(), False, None


class TestStreamDecoder:
    def test_a_character_comes_whole(self, toy: Tokenizer) -> None:
        decoder = StreamDecoder(toy)
        assert [decoder.feed(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
        assert decoder.flush() == ""

    def test_an_unfinished_character_is_replaced_at_the_end(self, toy: Tokenizer) -> None:
        decoder = StreamDecoder(toy)
        assert [decoder.feed(byte) for byte in "猫".encode()[:2]] == ["", ""]
        assert decoder.flush() == "\ufffd"
        assert decoder.feed(97) == "a", "after flush it starts afresh"

    def test_ids_that_give_no_text(self, toy: Tokenizer) -> None:
        decoder = StreamDecoder(toy, skip={toy.im_end})
        assert [decoder.feed(token) for token in (97, toy.n_vocab, toy.im_end, toy.box_start)] == ["a", "", "", "<box>"]

    def test_an_unclosed_image_does_not_end_the_stream(self, toy: Tokenizer) -> None:
        decoder = StreamDecoder(toy)
        assert "".join(decoder.feed(token) for token in (toy.img_start, 98)) + decoder.flush() == "<img>b"

    @settings(deadline=None)
    @given(st.lists(st.integers(0, TOY.n_vocab - 1).filter(lambda token: token != TOY.img_start)))
    def test_deltas_join_to_the_whole(self, ids: list[int]) -> None:
        decoder = StreamDecoder(TOY)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == TOY.decode(ids)


class TestStopMatcher:
    @pytest.mark.parametrize(
        ("stops", "pieces", "shown", "matched"),
        [
            (["END"], ["abEND"], "ab", "END"),
            (["END"], ["ab", "E", "N", "D", "x"], "ab", "END"),
            (["END"], ["abEN", "x"], "abENx", None),
            (["END"], ["abEN"], "abEN", None),
            (["aab"], ["a", "a", "a", "b"], "a", "aab"),
            (["abc", "b"], ["abc"], "a", "b"),
            (["b", "ab"], ["xab"], "x", "ab"),
            (["\n\nHuman:"], ["Yes.\n", "\nHum", "an", ": no"], "Yes.", "\n\nHuman:"),
            ([], ["all of it"], "all of it", None),
            (["。"], ["好", "。", "再见"], "好", "。"),
        ],
    )
    def test_cuts(self, stops: list[str], pieces: list[str], shown: str, matched: str | None) -> None:
        assert stream(stops, pieces) == (shown, matched is not None, matched)

    def test_holds_back_only_what_may_still_match(self) -> None:
        matcher = StopMatcher(["stop"])
        assert matcher.feed("go st") == ("go ", False)
        assert matcher.feed("r") == ("str", False)
        assert matcher.flush() == ""

    def test_text_after_a_stop_is_swallowed(self) -> None:
        matcher = StopMatcher(["x"])
        assert matcher.feed("axb") == ("a", True)
        assert matcher.feed("more") == ("", True)
        assert matcher.flush() == ""

    def test_an_empty_stop_string(self) -> None:
        with pytest.raises(PromptError, match="empty"):
            StopMatcher(["ok", ""])

    @settings(deadline=None)
    @given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab", max_size=5)))
    def test_the_split_does_not_matter(self, stops: list[str], pieces: list[str]) -> None:
        text = "".join(pieces)
        ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
        cut = min(ends)[1:] if ends else (len(text), None)
        assert stream(stops, pieces) == (text[: cut[0]], cut[1] is not None, cut[1])
