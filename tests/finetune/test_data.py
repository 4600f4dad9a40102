"""Training data: all faults in one list before the first step, nothing cut, micro-batches without padding."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.data import NOTHING, TOO_LONG, FaultyDataError, read_dataset
from qvl_runtime.finetune.labels import IGNORED
from qvl_runtime.finetune.packing import Schedule, epoch_rows, row_of
from qvl_runtime.prompt.tokenizer import Tokenizer

pytestmark = pytest.mark.unit
TOKENS = Tokenizer.from_folder(NANO, 64)


def record(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {
        "conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}],
        **more,
    }


def write(folder: Path, records: list[Any], lines: bool = False) -> Path:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "dog.png")
    (folder / "text.png").write_text("no image")
    path = folder / ("data.jsonl" if lines else "data.json")
    parts = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("\n".join(parts) if lines else f"[{','.join(parts)}]", encoding="utf-8")
    return path


BAD = [
    record("<img>cat.png</img>"),
    record("Box it", "<ref>dog</ref><box>(1,2),(3,1004)</box>"),
    record("Box it", "<ref>dog<box>(1,2),(3,4)</box>"),
    record("<img>text.png</img>"),
    {"conversations": [{"from": "robot", "value": "a"}]},
    record("<img>dog.png"),
]


def test_all_faults_are_listed_at_once_with_their_records(tmp_path: Path) -> None:
    good = record("Picture 1: <img>dog.png</img>\nA dog?")
    path = write(tmp_path, [good, *BAD, good])
    with pytest.raises(FaultyDataError, match=r"6 faulty records.*skip_bad") as caught:
        read_dataset(path, TOKENS, 500)
    for number, words in zip(range(2, 8), ("cat.png", "1004", "ref", "text.png", "robot", "</img>"), strict=True):
        own = [str(fault) for fault in caught.value.faults if f"(record {number})" in str(fault)]
        assert len(own) == 1 and words in own[0], (number, own)
    data = read_dataset(path, TOKENS, 500, skip_bad=True)
    assert len(data.samples) == 2 and len(data.faults) == 6


def test_lines_go_on_after_one_that_is_not_json_and_a_list_does_not(tmp_path: Path) -> None:
    broken = '{"conversations": [{"from"'
    lines = read_dataset(write(tmp_path, [record("a"), broken, record("b")], lines=True), TOKENS, 500, skip_bad=True)
    assert len(lines.samples) == 2 and len(lines.faults) == 1
    listed = read_dataset(write(tmp_path, [record("a"), broken, record("b")]), TOKENS, 500, skip_bad=True)
    assert len(listed.samples) == 1 and "JSON" in str(listed.faults[0])


def test_what_is_too_long_or_teaches_nothing_is_left_out_whole_and_counted(tmp_path: Path) -> None:
    question = {"conversations": [{"from": "user", "value": "Hello?"}]}
    path = write(tmp_path, [record("a"), record("<img>dog.png</img>"), question])
    data = read_dataset(path, TOKENS, 60, "answers")
    assert len(data.samples) == 1 and data.left_out == {TOO_LONG: 1, NOTHING: 1}
    with pytest.raises(ConfigError, match=r"nothing to train on.*maximum length of 10"):
        read_dataset(path, TOKENS, 10, "answers")


def test_a_file_without_records_and_one_with_a_single_fault_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no records"):
        read_dataset(write(tmp_path, []), TOKENS, 60)
    with pytest.raises(FaultyDataError, match=r"1 faulty record: .*: correct it, or use skip_bad"):
        read_dataset(write(tmp_path, [record("a"), record("<img>gone.png</img>")]), TOKENS, 60)


def test_a_row_joins_samples_and_restarts_their_positions(tmp_path: Path) -> None:
    data = read_dataset(write(tmp_path, [record("a<img>dog.png</img>"), record("bb", "no")]), TOKENS, 500)
    row = row_of(data.samples)
    first, second = map(len, data.samples)
    assert row.documents.bounds == (0, first, first + second)
    assert row.positions.tolist() == [*range(first), *range(second)]
    assert row.image_starts.tolist() == [data.samples[0].images[0].start]
    wanted = [
        (at + i, sample.labels[i + 1])
        for sample, at in zip(data.samples, (0, first), strict=True)
        for i in range(len(sample) - 1)
        if sample.labels[i + 1] != IGNORED
    ]
    assert list(zip(row.predicting.tolist(), row.targets.tolist(), strict=True)) == wanted
    assert len(wanted) == data.num_targets


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(0, 5), st.sampled_from([None, 50, 120]))
def test_an_epoch_has_each_sample_once_in_rows_that_fit(lengths: list[int], epoch: int, pack_to: int | None) -> None:
    rows = epoch_rows(lengths, 3, epoch, 2, pack_to)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert rows == epoch_rows(lengths, 3, epoch, 2, pack_to), "the seed names the order"
    if pack_to is None:
        assert all(len(row) <= 2 for row in rows)
    else:
        assert all(sum(lengths[i] for i in row) <= pack_to for row in rows)


def test_epochs_differ_and_steps_take_their_rows_in_order() -> None:
    schedule = Schedule([10] * 40, 0, 2, 1, None, 8)
    steps = schedule.steps()
    assert [len(step) for step in steps] == [8] * 10
    assert steps[:5] != steps[5:]
