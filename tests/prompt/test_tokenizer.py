from __future__ import annotations

import base64
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qvl_runtime
from qvl_runtime.errors import CheckpointError, PromptError
from qvl_runtime.prompt.tokenizer import Allowed, Tokenizer

from .chat import spell_path
from .conftest import Oracle, answer, expected, toy_ranks

TOY = Tokenizer(toy_ranks(), n_queries=4)
MODES: tuple[Allowed, ...] = ("all", "image_tags", "grounding", "none")


def write_vocabulary(folder: Path, ranks: dict[bytes, int]) -> None:
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))


def spelled(tokenizer: Tokenizer, text: str, allowed: Allowed) -> list[int]:
    """Ids as the original writes them: each span's pads give way to the spelling of its path."""
    segment = tokenizer.encode_tagged(text, allowed)
    ids = list(segment.ids)
    for slot in segment.slots:
        assert isinstance(slot.source, str)
        ids[slot.start : slot.start + tokenizer.n_queries] = spell_path(tokenizer, slot.source)
    return ids


class TestGoldens:
    def test_encode(self, oracle: Oracle) -> None:
        for case in oracle.tokens["encode"]:
            default = case["ids"]
            tags_only = case.get("ids_allowed_image_tags_only", default)
            none = case.get("ids_allowed_none", tags_only)
            for allowed, golden in (("all", default), ("image_tags", tags_only), ("none", none)):
                result = answer(spelled, oracle.tokenizer, case["text"], allowed)
                assert result == expected(golden), (allowed, case["text"])

    def test_decode_of_encoded(self, oracle: Oracle) -> None:
        for case in oracle.tokens["encode"]:
            if "decoded" not in case:
                continue
            without_special = case.get("decoded_skip_special", case["decoded"])
            for skip, golden in ((False, case["decoded"]), (True, without_special)):
                result = answer(oracle.tokenizer.decode, case["ids"], skip_special_tokens=skip)
                assert result == expected(golden), case["text"]

    @pytest.mark.parametrize(
        ("key", "errors", "skip"),
        [
            ("default", "replace", False),
            ("errors_ignore", "ignore", False),
            ("errors_strict", "strict", False),
            ("skip_special", "replace", True),
            ("skip_special_ignore", "ignore", True),
        ],
    )
    def test_decode(self, oracle: Oracle, key: str, errors: str, skip: bool) -> None:
        for case in oracle.tokens["decode"]:
            result = answer(oracle.tokenizer.decode, case["ids"], errors=errors, skip_special_tokens=skip)
            assert result == expected(case[key]), case["ids"][:12]

    def test_special_ids(self, oracle: Oracle) -> None:
        tokenizer, constants = oracle.tokenizer, oracle.tokens["constants"]
        assert tokenizer.special_tokens == constants["special_tokens"]
        assert (tokenizer.n_vocab, tokenizer.n_ranks) == (constants["n_vocab"], constants["n_ranks"])
        assert tokenizer.n_queries == constants["IMG_TOKEN_SPAN"]
        assert tokenizer.endoftext == constants["eod_id"]
        for name in ("im_start", "im_end", "img_start", "img_end", "img_pad", "ref_start", "ref_end"):
            assert getattr(tokenizer, name) == constants[f"{name}_id"], name
        for name in ("box_start", "box_end", "quad_start", "quad_end"):
            assert getattr(tokenizer, name) == constants[f"{name}_id"], name
        bytes_of = [list(tokenizer.token_bytes(rank)) for rank in range(256)]
        assert bytes_of == constants["first_256_ranks_bytes"]

    def test_image_start_follows_the_configuration(self, golden: Path) -> None:
        assert Tokenizer.from_folder(golden / "tiny", image_start_id=1238).img_start == 1238


class TestEncode:
    def test_merges_and_specials(self, toy: Tokenizer) -> None:
        assert toy.encode("the你<|im_end|>") == [toy.n_ranks - 7, toy.n_ranks - 1, toy.im_end]

    @pytest.mark.parametrize("allowed", MODES)
    def test_modes(self, toy: Tokenizer, allowed: Allowed) -> None:
        ids = toy.encode("<|im_start|><ref>x</ref><img>p</img>", allowed)
        special = {token for token in ids if token >= toy.n_ranks}
        grounding, image = {toy.ref_start, toy.ref_end}, {toy.img_start, toy.img_pad, toy.img_end}
        allowed_tags = {
            "all": {toy.im_start} | grounding | image,
            "image_tags": grounding | image,
            "grounding": grounding,
            "none": set(),
        }
        assert special == allowed_tags[allowed]

    def test_span_holds_pads_and_keeps_the_source_to_the_letter(self, toy: Tokenizer) -> None:
        decomposed = "e\u0301.png"
        segment = toy.encode_tagged(f"a<img>{decomposed}</img>b")
        assert segment.ids == [97, toy.img_start, *[toy.img_pad] * 4, toy.img_end, 98]
        assert segment.slots == [(2, decomposed)]

    def test_a_path_may_be_longer_than_the_span(self, toy: Tokenizer) -> None:
        assert toy.encode_tagged(f"<img>{'p' * 5000}</img>").slots[0].source == "p" * 5000
        with pytest.raises(PromptError, match="5000 bytes"):
            spell_path(toy, "p" * 5000)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("see <img>a.png", "not closed"),
            ("<img>a<ref>b</ref></img>", "special tag inside"),
            ("<img>a<img>b</img>", "special tag inside"),
        ],
    )
    def test_malformed_images(self, toy: Tokenizer, text: str, message: str) -> None:
        with pytest.raises(PromptError, match=message):
            toy.encode(text)

    def test_lone_surrogates_from_json_do_not_fail(self, toy: Tokenizer) -> None:
        assert toy.decode(toy.encode("a\ud83db")) == "a\ufffdb"

    def test_endless_white_space_is_a_prompt_error(self, toy: Tokenizer) -> None:
        with pytest.raises(PromptError, match="white space") as caught:
            toy.encode(" " * 1_000_000 + "x")
        assert "\n" not in str(caught.value)

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_round_trip(self, text: str) -> None:
        ids = TOY.encode(text, "none")
        assert TOY.decode(ids, errors="strict") == unicodedata.normalize("NFC", text)
        assert all(token < TOY.n_ranks for token in ids)


class TestDecode:
    def test_our_spans_name_no_path(self, toy: Tokenizer) -> None:
        assert toy.decode(toy.encode("a<img>cat.png</img>b")) == "a<img></img>b"

    def test_spelled_path_round_trip(self, toy: Tokenizer) -> None:
        ids = [toy.img_start, *spell_path(toy, "猫"), toy.img_end]
        assert toy.decode(ids) == "<img>猫</img>"

    @pytest.mark.parametrize("token", [-1, TOY.n_vocab, 10**9])
    def test_ids_without_a_token(self, toy: Tokenizer, token: int) -> None:
        with pytest.raises(PromptError, match=f"token id {token} has no text"):
            toy.decode([97, token])


class TestVocabularyFile:
    def test_reads_what_was_written(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path, toy_ranks())
        tokenizer = Tokenizer.from_folder(tmp_path, n_queries=4)
        assert tokenizer.encode("the你") == TOY.encode("the你")
        assert tokenizer.img_start == tokenizer.n_ranks + 214

    def test_configuration_of_another_model(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path, toy_ranks())
        with pytest.raises(CheckpointError, match="image_start_id 151857"):
            Tokenizer.from_folder(tmp_path, image_start_id=151857)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"IQ== 0\nnot a line\n", "line 2"),
            (b"I!Q== 0\n", "line 1"),
            (b"IQ== zero\n", "line 1"),
            (b"IQ== 0\n", "256 single bytes"),
            (b"", "256 single bytes"),
        ],
    )
    def test_damaged(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "qwen.tiktoken").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)

    def test_a_gap_in_the_ranks(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path, toy_ranks() | {b"zzz": 9999})
        with pytest.raises(CheckpointError, match="each once"):
            Tokenizer.from_folder(tmp_path)

    def test_nano_vocabulary(self) -> None:
        folder = Path(qvl_runtime.__path__[0]) / "nano"
        if not (folder / "qwen.tiktoken").is_file():
            pytest.skip(f"no nano checkpoint at {folder}")
        tokenizer = Tokenizer.from_folder(folder, n_queries=64)
        text = "框出图中的红色圆形 <ref>circle</ref><box>(1,2),(30,400)</box>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode("<img>a</img>")) == 66
