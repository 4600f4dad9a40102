"""Evaluation in the loop: what is asked, how answers are scored, and that they come from the weights in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine.engine import NANO
from qvl_runtime.finetune.data import read_dataset
from qvl_runtime.finetune.evaluation import Evaluation, has_answer, question_of, score
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.prompt.tokenizer import Tokenizer
from tests.finetune.small import learner

pytestmark = pytest.mark.cpu
TOKENS = Tokenizer.from_folder(NANO, 64)
BOX = "<ref>cat</ref><box>(100,100),(300,300)</box>"


def test_scores_count_texts_and_the_overlap_of_boxes_with_the_same_label() -> None:
    half = "<ref>cat</ref><box>(100,100),(300,200)</box>"
    other = "<ref>dog</ref><box>(100,100),(300,300)</box>"
    assert score([" yes", "no"], ["yes", "yes"]) == {"exact": 0.5}
    scores = score([BOX, half, other, "none"], [BOX] * 4)
    assert scores == {"exact": 0.25, "box_iou": pytest.approx(1.5 / 4), "box_iou_50": 0.5}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_answers_are_those_of_the_weights_in_training(method: str, tmp_path: Path) -> None:
    turns = [("user", "Hello!"), ("assistant", "Hi"), ("user", "Who are you?"), ("assistant", "I am nano")]
    messages = [{"from": role, "value": text} for role, text in turns]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": messages}, {"conversations": messages[:3]}]))
    data = read_dataset(tmp_path / "data.json", TOKENS, 200)
    assert [has_answer(sample) for sample in data.samples] == [True, False]
    question = question_of(TOKENS, data.samples[0])
    assert question.reference == "I am nano"
    assert TOKENS.decode(question.prompt["token_ids"]).endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
    folder = NANO.with_name("nano_int4") if method == "qlora" else NANO
    options = FinetuneOptions(method=method, max_length=200, lora=AdapterConfig(r=4))
    one = learner(folder, method=method, dtype="float32", lora=options.lora)
    evaluation = Evaluation(one, TOKENS, data, folder, options)
    engine = Engine(folder, device="cpu", dtype="float32", max_model_len=512)
    plain = engine.generate([question.prompt], SamplingParams(temperature=0, max_tokens=512))[0].text
    assert evaluation.answers() == [plain], "side paths start at nothing"
    scores = evaluation()
    assert scores["held_out_loss"] > 0 and set(scores) == {"held_out_loss", "exact"}
    with torch.no_grad():
        for parameter in one.network.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    assert evaluation.answers() != [plain]
