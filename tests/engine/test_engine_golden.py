"""The engine against the original's `generate` and `chat`: greedy ids exact in float32, on the oracle's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qvl_runtime import Engine, SamplingParams
from tests.model.oracle import LOGITS, close, spelled_images, without_padding
from tests.stand_ins import plain, recorded_features

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def engine(golden: Path) -> Engine:
    return engine_of(golden, "tiny", max_model_len=2048)


def engine_of(golden: Path, name: str, **options: Any) -> Engine:
    """An engine that knows the features of what stands in for the photos where they are not committed."""
    engine = Engine(golden / name, **options)
    for digest, features in recorded_features(golden, engine.config.visual.image_size).items():
        engine.core.runner.images.put(digest, features)
    return engine


@pytest.fixture(scope="module")
def said(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "generation.json").read_text())
    return content


@pytest.fixture
def full_engine(full_golden: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """For text, which needs the published vocabulary; runs where the original ran: its prompts name relative paths."""
    monkeypatch.chdir(full_golden)
    return Engine(full_golden / "tiny", max_model_len=2048)


def greedy(tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=tokens, temperature=0, repetition_penalty=others.pop("repetition_penalty", 1.0), **others
    )


def prompt_of(engine: Engine, ids: list[int]) -> dict[str, Any]:
    root = engine.folder.parent
    paths = [image.path for image in spelled_images(ids, engine.config)]
    return {"token_ids": ids, "images": [root / path if (root / path).is_file() else plain(path) for path in paths]}


def flat(ids: list[Any]) -> list[int]:
    return ids[0] if isinstance(ids[0], list) else ids


@pytest.mark.parametrize("name", ["i", "ii", "iii"])
def test_greedy(engine: Engine, said: dict[str, Any], name: str) -> None:
    want = said[name]
    out = engine.generate([prompt_of(engine, flat(want["input_ids"]))], greedy(48, ignore_eos=True))[0]
    assert list(out.token_ids) == flat(want["new_ids"])
    assert out.text == want.get("decoded_new", out.text)  # the text of the published vocabulary is not committed
    assert out.finish_reason == "length"


@pytest.mark.parametrize("name", ["i_repetition_penalty_1.1", "ii_repetition_penalty_1.1"])
def test_repetition_penalty(engine: Engine, said: dict[str, Any], name: str) -> None:
    """The original also counts the bytes of an image's path, which our prompt lacks: here that changes no choice."""
    want = said[name]
    params = greedy(48, ignore_eos=True, repetition_penalty=want["repetition_penalty"])
    out = engine.generate([prompt_of(engine, flat(want["input_ids"]))], params)[0]
    assert list(out.token_ids) == flat(want["new_ids"])


@pytest.mark.parametrize("name", ["vi_batch_left_padded", "vi2_batch_left_padded"])
def test_batches(engine: Engine, said: dict[str, Any], name: str) -> None:
    """Each prompt as alone. The original's padding changes alpha and log-n beyond seq_length (row 2 has none)."""
    import torch

    want = said[name]
    prompts = without_padding(torch.tensor(want["input_ids"]), torch.tensor(want["attention_mask"]))
    outs = engine.generate([{"token_ids": ids} for ids in prompts], greedy(24, ignore_eos=True))
    alike = (
        range(3)
        if name.startswith("vi_")
        else [i for i, ids in enumerate(prompts) if len(ids) == len(want["input_ids"][i])]
    )
    assert alike
    for i in alike:
        assert list(outs[i].token_ids) == want["new_ids"][i], f"row {i}"


def test_stop_sequence(engine: Engine, said: dict[str, Any]) -> None:
    """The original shows the stop words and an eos after them; here the text ends before them."""
    want = said["i_stop_words"]
    stop = engine.tokenizer.decode(want["stop_words_ids"][0])
    out = engine.generate([prompt_of(engine, flat(want["input_ids"]))], greedy(48, stop=(stop,)))[0]
    assert list(out.token_ids) == flat(want["new_ids"])[:-1]
    assert out.finish_reason == "stop"
    whole = out.text + stop + "<|endoftext|>"
    assert whole == want.get("decoded_new", whole)


def test_chat_turns(full_engine: Engine, full_golden: Path) -> None:
    """Three turns of the original's `chat`, as the tagged text it builds (its image numbers restart in each turn)."""
    engine, said = full_engine, json.loads((full_golden / "generation.json").read_text())
    for turn in said["chat"]:
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
        for question, answer in [*turn["history_before"], (turn["query"], None)]:
            text += f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if answer is None else f"{answer}<|im_end|>"
        out = engine.generate([text], greedy(24))[0]
        # the original drops the last token of an answer that max_new_tokens cut
        kept = engine.tokenizer.decode(list(out.token_ids[:-1]))
        assert kept.strip() == turn["response"]
        assert out.finish_reason == "length"


def test_chat_messages(full_engine: Engine, full_golden: Path) -> None:
    want = json.loads((full_golden / "generation.json").read_text())["chat_first_turn_new_ids"]
    parts = [{"type": "image", "image": "images/beach.jpg"}, {"type": "text", "text": "What is this?"}]
    out = full_engine.chat([{"role": "user", "content": parts}], greedy(24))
    assert list(out.token_ids) == flat(want["new_ids"])


def test_int4_greedy(golden: Path) -> None:
    want = load_file(golden / "lm_int4.safetensors")
    engine = engine_of(golden, "tiny-int4", dtype="float32", max_model_len=512)
    out = engine.generate([prompt_of(engine, want["ii_ids"][0].tolist())], greedy(32, ignore_eos=True))[0]
    assert list(out.token_ids) == want["ii_greedy32"].tolist()


def test_score(engine: Engine, golden: Path) -> None:
    want = load_file(golden / "lm_i_text20.safetensors")
    ids = want["ids"][0].tolist()
    score = engine.score({"token_ids": ids}, return_logits=True)
    assert score.logits is not None and score.token_ids == tuple(ids)
    close(score.logits, want["logits"][0], LOGITS, "logits")
    chosen = want["logits"][0].log_softmax(-1)[:-1].gather(1, want["ids"][0][1:, None])[:, 0]
    close(score.logprobs, chosen, LOGITS, "logprobs")
    close(engine.score({"token_ids": ids}).logprobs, chosen, LOGITS, "without logits")
