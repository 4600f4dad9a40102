"""`qvl check` on nano, with dialogues of its own, right and wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qvl_runtime import Engine
from qvl_runtime.cli.app import app
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CheckpointError, DataError, ImageError, PromptError
from qvl_runtime.evaluate.check.check import check
from qvl_runtime.evaluate.check.dialogues import DOCUMENTED, Dialogue, Turn, documented, read_dialogues
from qvl_runtime.evaluate.check.files import check_files
from qvl_runtime.evaluate.check.page import page
from qvl_runtime.evaluate.check.replies import compare_dialogue
from qvl_runtime.prompt.boxes import parse_boxes

pytestmark = pytest.mark.cpu
DEMO = str(NANO.with_name("assets") / "demo.jpg")
CAPTION = "Generate the caption in English with grounding:"


@pytest.fixture(scope="module")
def nano() -> Engine:
    return Engine(dtype="float32", max_model_len=1024, progress=False)


@pytest.fixture(scope="module")
def right(nano: Engine) -> Dialogue:
    """What nano answers."""
    question = {"role": "user", "content": [{"image": DEMO}, {"text": "How many things are there?"}]}
    first = nano.chat([question]).text
    then = [question, {"role": "assistant", "content": first}, {"role": "user", "content": "Box the cat."}]
    return Dialogue(
        "right", "chat", (Turn("How many things are there?", first), Turn("Box the cat.", nano.chat(then).text))
    )


def changed(dialogue: Dialogue, answer: str) -> Dialogue:
    """With another second answer."""
    first, second = dialogue.turns
    return Dialogue("wrong", "chat", (first, Turn(second.question, answer)))


def test_a_right_dialogue_is_reproduced_token_for_token(nano: Engine, right: Dialogue) -> None:
    for one in compare_dialogue(nano, right, DEMO):
        assert (one.reproduced, one.equal_tokens, one.likeliest) == (True, one.tokens, one.tokens)
        assert one.verdict == "reproduced, token for token"
        assert -0.5 < one.logprob <= 0


def test_a_box_that_is_near_is_close_and_one_that_is_not_differs(nano: Engine, right: Dialogue) -> None:
    box = parse_boxes(right.turns[1].answer)[0]
    near = f"<ref>cat</ref><box>({box.x1 + 2},{box.y1}),({box.x2},{box.y2 - 3})</box>"
    far = "<ref>cat</ref><box>(1,2),(30,40)</box>"
    close, differs = (compare_dialogue(nano, changed(right, answer), DEMO)[1] for answer in (near, far))
    assert not close.reproduced
    assert close.verdict.startswith("close")
    assert 0.95 < close.overlaps[0] < 1
    assert differs.verdict == "differs: boxes overlap by 0.00"
    assert differs.logprob < close.logprob


def test_a_wrong_text_says_where_it_parts(nano: Engine) -> None:
    [one] = compare_dialogue(nano, Dialogue("w", "chat", (Turn("How many things are there?", "7 of them"),)), DEMO)
    assert (one.equal_tokens, one.reproduced, one.answer.isdigit()) == (0, False, True)
    assert one.verdict.startswith("differs after 0 of")


def test_a_second_turn_follows_the_documented_first(nano: Engine, right: Dialogue) -> None:
    first, second = right.turns
    wrong_first = Dialogue("w", "chat", (Turn(first.question, "11"), second))
    compared = compare_dialogue(nano, wrong_first, DEMO)
    assert [one.reproduced for one in compared] == [False, True]


def test_a_base_dialogue_is_continued(nano: Engine) -> None:
    [one] = compare_dialogue(nano, Dialogue("b", "base", (Turn(CAPTION, "nothing like it"),)), DEMO)
    assert not one.reproduced


def test_a_check_writes_one_page(nano: Engine, right: Dialogue) -> None:
    wrong = changed(right, "nothing")
    report = check(lambda folder: nano, NANO, [right, wrong], DEMO, other=NANO, speed=False)
    assert (report.reproduced, report.passed, report.finite) == (["right"], True, True)
    text = page(report)
    assert "dialogues reproduced: right" in text
    assert "101 bfloat16" in text
    assert "| right | `Box the cat.` | yes |" in text
    assert report.files.files["model.safetensors"][1] in text


def test_a_check_without_a_picture_asks_nothing(nano: Engine) -> None:
    report = check(lambda folder: nano, NANO, documented("chatml"), speed=False)
    assert (report.compared, report.passed, report.finite) == ([], True, None)
    assert "name the authors' demo picture" in page(report)


def test_a_check_of_wrong_dialogues_fails(nano: Engine, right: Dialogue) -> None:
    assert not check(lambda folder: nano, NANO, [changed(right, "nothing")], DEMO, speed=False).passed


def test_pictures_that_are_missing(nano: Engine, right: Dialogue, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="name a file"):
        compare_dialogue(nano, right, None)
    with pytest.raises(ImageError):
        compare_dialogue(nano, right, str(tmp_path / "none.jpg"))


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(NANO, folder)
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("transformer.ln_f.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight"):
        check_files(folder)
    save_file({**tensors, "transformer.ln_f.weight": norm[:7].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight"):
        check_files(folder)


def test_the_documented_dialogues_are_whole() -> None:
    assert [dialogue.name for dialogue in documented("raw")] == ["Qwen-VL"]
    assert len(documented("chatml")) == 2
    boxes = [len(parse_boxes(turn.answer, strict=True)) for dialogue in DOCUMENTED for turn in dialogue.turns]
    assert boxes == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        [{"name": "x", "kind": "other", "turns": []}],
        [{"name": "x", "kind": "chat", "turns": []}],
        [{"name": "x", "kind": "base", "turns": [{"question": "q", "answer": "a"}] * 2}],
        [{"name": "x", "kind": "chat", "turns": [{"question": "q"}]}],
        [{"kind": "chat", "turns": [{"question": "q", "answer": "a"}]}],
    ],
)
def test_files_of_dialogues_that_are_none(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=r"d\.json"):
        read_dialogues(path)


def test_the_command_says_what_is_reproduced(right: Dialogue, tmp_path: Path) -> None:
    turns = [{"question": turn.question, "answer": turn.answer} for turn in right.turns]
    wrong = [{**turns[0], "answer": "77"}]
    for name, kept, code in (("right", turns, 0), ("wrong", wrong, 3)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"name": name, "kind": "chat", "picture": DEMO, "turns": kept}]))
        out = tmp_path / f"{name}.md"
        arguments = [
            "check",
            "--dialogues",
            str(path),
            "--no-speed",
            "--quiet",
            "--dtype",
            "float32",
            "--out",
            str(out),
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.stderr
        assert result.stdout == out.read_text(encoding="utf-8")
        assert ("reproduced: right" in result.stdout) == (code == 0)
