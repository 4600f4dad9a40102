"""generation_config.json: what it says of answers is done, or refused by name; what changes nothing is accepted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qvl_runtime
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import ConfigError

NANO = Path(qvl_runtime.__file__).parent / "nano"
DEMO = str(NANO.parent / "assets" / "demo.jpg")
PROMPT = [{"role": "user", "content": [{"image": DEMO}, {"text": "Describe the image."}]}]
Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An engine of nano with more keys in its generation_config.json."""

    def engine(**keys: Any) -> Engine:
        folder = tmp_path_factory.mktemp("nano") / "nano"
        folder.mkdir()
        for path in NANO.iterdir():
            (folder / path.name).symlink_to(path)
        raw = json.loads((NANO / "generation_config.json").read_text())
        (folder / "generation_config.json").unlink()
        (folder / "generation_config.json").write_text(json.dumps({**raw, **keys}))
        return Engine(folder, device="cpu", dtype="float32", kv_cache_bytes=1 << 22)

    return engine


@pytest.fixture(scope="module")
def plain(make: Make) -> tuple[int, ...]:
    """The greedy answer without any of these keys, an end token included."""
    (ids,) = [make().chat(PROMPT, SamplingParams(temperature=0)).token_ids]
    assert len(ids) >= 6 and len(set(ids[:4])) == 4
    return ids


def test_each_of_several_end_ids_ends_an_answer(make: Make, plain: tuple[int, ...]) -> None:  # Qwen#1001, exllamav2#449
    end = plain[2]
    first = plain.index(end)
    for eos in ([896, end], [end], end, [896, 897, end]):  # mlc-llm#1924
        engine = make(eos_token_id=eos)
        answer = engine.chat(PROMPT, SamplingParams(temperature=0))
        assert answer.token_ids == plain[: first + 1] and answer.finish_reason == "stop"
        assert answer.text == engine.tokenizer.decode(plain[:first])
        assert f"ends at id {end}" in str(engine.defaults_note())


def test_stop_words_end_an_answer(make: Make, plain: tuple[int, ...]) -> None:  # Qwen#1001, vllm#1136
    first = plain.index(plain[3])
    for words in ([[plain[3]]], [[1, 2, 3], [plain[3]]], [[plain[2], plain[3]]]):
        engine = make(stop_words_ids=words)
        answer = engine.chat(PROMPT, SamplingParams(temperature=0))
        assert answer.finish_reason == "stop" and len(answer.token_ids) == first + 1
        assert answer.text == engine.tokenizer.decode(plain[: first + 1 - len(words[-1])])
        assert "ends at id" in str(engine.defaults_note())
    assert make(stop_words_ids=[[896]]).defaults_note() == make().defaults_note()  # it ends answers anyway


def test_stop_strings_end_an_answer(make: Make, plain: tuple[int, ...]) -> None:
    engine = make()
    text = engine.chat(PROMPT, SamplingParams(temperature=0)).text
    stop = text[3:6]
    for strings in (stop, [stop], ["never in there", stop]):
        engine = make(stop_strings=strings)
        assert engine.chat(PROMPT, SamplingParams(temperature=0)).text == text[: text.index(stop)]
        assert f"stop {stop!r}" in str(engine.defaults_note())
    both = engine.chat(PROMPT, SamplingParams(temperature=0, stop=(text[1],)))
    assert both.text == text[: text.index(text[1])], "strings of a request join those of the file"


def test_a_request_continues_past_all_of_them(make: Make, plain: tuple[int, ...]) -> None:
    """ignore_eos leaves out every end that the checkpoint has, and none that the request has."""
    engine = make(eos_token_id=[plain[1]], stop_words_ids=[[plain[2]], [plain[2], plain[3]]], stop_strings=[" "])
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=5)
    answer = engine.chat(PROMPT, params)
    assert answer.token_ids == plain[:5] and answer.finish_reason == "length"
    stopped = engine.chat(PROMPT, SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(plain[4],)))
    assert stopped.token_ids == plain[: plain.index(plain[4]) + 1]
    assert "ends at" not in str(engine.defaults_note(params))


@pytest.mark.parametrize("key", ["suppress_tokens", "bad_words_ids"])
def test_suppressed_tokens_do_not_occur(make: Make, plain: tuple[int, ...], key: str) -> None:
    banned = [plain[0], plain[2]]
    engine = make(**{key: banned if key == "suppress_tokens" else [[token] for token in banned]})
    answer = engine.chat(PROMPT, SamplingParams(temperature=0))
    assert not set(banned) & set(answer.token_ids)
    biased = make().chat(PROMPT, SamplingParams(temperature=0, logit_bias=dict.fromkeys(banned, float("-inf"))))
    assert answer.token_ids == biased.token_ids
    assert "2 suppressed ids" in str(engine.defaults_note())
    allowed = engine.chat(PROMPT, SamplingParams(temperature=0, logit_bias=dict.fromkeys(banned, 0.0)))
    assert allowed.token_ids == plain, "the parameters of a request count"


def test_max_time_is_the_default_of_timeout_s(make: Make) -> None:
    engine = make(max_time=1e-9)
    assert engine.chat(PROMPT).finish_reason == "deadline"
    assert engine.chat(PROMPT, SamplingParams(timeout_s=60)).finish_reason == "stop"
    assert "timeout_s 1e-09" in str(engine.defaults_note())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[5, 6]]),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 5),
        ("num_beams", 4),
        ("min_length", 10),
        ("begin_suppress_tokens", [5]),
        ("sequence_bias", [[[5], -2.0]]),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("exponential_decay_length_penalty", [10, 1.1]),
        ("forced_decoder_ids", [[1, 5]]),
        ("encoder_repetition_penalty", 1.1),
        ("token_healing", True),
        ("dola_layers", "high"),
    ],
)
def test_what_would_change_answers_is_refused_by_name(key: str, value: Any) -> None:  # TensorRT-Model-Connect#640
    with pytest.raises(ConfigError) as caught:
        GenerationDefaults.from_dict({key: value})
    assert key in str(caught.value) and "remove" in str(caught.value)


@pytest.mark.parametrize("key", ["typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"])
def test_cuts_of_sampling_matter_where_it_samples(key: str) -> None:
    GenerationDefaults.from_dict({key: 0.3, "do_sample": False})
    with pytest.raises(ConfigError, match=key):
        GenerationDefaults.from_dict({key: 0.3, "do_sample": True})


# What transformers 4.40 and 5.20 hold where nothing was set; files saved with all keys have these.
OF_TRANSFORMERS: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False,
    "max_time": None, "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None,
    "use_cache": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "diversity_penalty": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "force_words_ids": None,
    "renormalize_logits": False, "constraints": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_decoder_ids": None, "sequence_bias": None, "guidance_scale": None,
    "low_memory": None, "num_return_sequences": 1, "output_attentions": False, "output_scores": False,
    "return_dict_in_generate": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "encoder_no_repeat_ngram_size": 0, "decoder_start_token_id": None, "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic", "generation_kwargs": {}, "_from_model_config": False,
    "_commit_hash": None, "transformers_version": "4.40.2", "cache_config": None, "min_p": None, "top_h": None,
    "token_healing": None, "watermarking_config": None, "dola_layers": None, "stop_strings": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [
        OF_TRANSFORMERS,
        dict.fromkeys(OF_TRANSFORMERS),
        {"top_k": 0.0},
        {"top_k": 50.0, "max_new_tokens": 512.0},
        {"num_beams": None},
        {"pad_token_id": [1, 2]},
        {"pad_token_id": [-1]},
        {"eos_token_id": []},
        {"eos_token_id": None, "stop_words_ids": None},
        {"bad_words_ids": [], "suppress_tokens": [], "stop_strings": [], "sequence_bias": {}},
        {"num_beams": 1.0, "no_repeat_ngram_size": 0.0, "typical_p": 1, "do_sample": True},
    ],
)
def test_values_without_effect_are_accepted(raw: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    defaults = GenerationDefaults.from_dict(raw)
    assert (defaults.end_ids, defaults.suppressed_ids, defaults.stop_strings) == ((), (), ())
    assert not caplog.records


@pytest.mark.parametrize("key", ["max_length", "num_return_sequences", "my_own_key"])
def test_keys_that_are_not_used_are_named(key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GenerationDefaults.from_dict({key: 4096})
    assert f"{key!r} 4096" in caplog.text and "not used here" in caplog.text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"eos_token_id": "im_end"}, ["eos_token_id", "'im_end'", "token ids"]),
        ({"eos_token_id": [1, True]}, ["eos_token_id", "True"]),
        ({"eos_token_id": 1.5}, ["eos_token_id", "1.5"]),
        ({"stop_words_ids": [5]}, ["stop_words_ids", "[5]", "[[151643]]"]),
        ({"stop_words_ids": [[]]}, ["stop_words_ids"]),
        ({"stop_words_ids": [["a"]]}, ["stop_words_ids", "'a'"]),
        ({"stop_strings": [5]}, ["stop_strings", "[5]"]),
        ({"stop_strings": [""]}, ["stop_strings"]),
        ({"suppress_tokens": {"a": 1}}, ["suppress_tokens"]),
        ({"max_time": -1}, ["max_time is -1"]),
        ({"temperature": float("inf")}, ["temperature inf"]),
    ],
)
def test_malformed_values_are_named(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationDefaults.from_dict(raw)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("keys", [{"eos_token_id": [151643, 151645]}, {"stop_words_ids": [[5, -1]]}])
def test_ids_of_another_model_are_refused(make: Make, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"has the token id .* take both files from one checkpoint"):
        make(**keys)


def test_streams_end_there_too(make: Make, plain: tuple[int, ...]) -> None:
    engine = make(stop_words_ids=[[plain[2], plain[3]]])
    pieces = list(engine.chat(PROMPT, SamplingParams(temperature=0), stream=True))
    last = pieces[-1].completion
    assert last is not None and "".join(piece.text for piece in pieces) == last.text
    assert last.text == engine.tokenizer.decode(plain[:2])
