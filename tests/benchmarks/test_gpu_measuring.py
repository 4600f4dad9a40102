"""What the GPU suite keeps, compiles and counts, without a GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import variants
from benchmarks.gpu.asking import text
from benchmarks.gpu.bounds import full_config
from benchmarks.gpu.encoder import operations, sizes
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.parts import EXPECTED, Parts, context_lost, parts_of
from benchmarks.gpu.place import COLD, MOST_CALLS, Place
from benchmarks.gpu.processes import do_all
from benchmarks.gpu.step import Spent, grouped, kernels_of
from benchmarks.gpu.suite import NOT_BY_DEFAULT, run
from benchmarks.gpu.targets import targets
from benchmarks.gpu.variants import questions

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make setup")
SETTING = {"commit": "abc", "device": "a GPU", "torch": "2", "triton": "3"}
pytestmark = pytest.mark.unit


def test_a_later_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    first = Journal(path)
    assert not first.begin(SETTING)
    for part in ("one", "two"):
        first.start(part)
        first.add(part, {"a": 1})
    first.finish("one", 2.5)
    with path.open("a") as file:
        file.write('{"part": "two", "ro')  # the process was killed
    second = Journal(path)
    assert second.begin(SETTING | {"date": "later"})
    assert second.done == {"one": 2.5} and second.rows == {"one": [{"a": 1}], "two": [{"a": 1}]}
    second.start("two")
    assert second.rows["two"] == [] and Journal(path).done == {"one": 2.5}


@pytest.mark.parametrize("key", ["commit", "device", "torch", "triton", "dry_run"])
def test_rows_of_other_code_or_hardware_are_forgotten(key: str, tmp_path: Path) -> None:
    first = Journal(tmp_path / "suite.jsonl")
    first.begin(SETTING)
    first.start("one")
    first.finish("one", 1.0)
    second = Journal(tmp_path / "suite.jsonl")
    assert not second.begin(SETTING | {key: "other"}) and second.done == {}


def test_a_part_that_fails_keeps_its_rows_and_stops_no_other(tmp_path: Path) -> None:
    def fails() -> Any:
        yield {"a": 1}
        raise ValueError("no")

    journal = Journal(tmp_path / "suite.jsonl")
    journal.begin(SETTING)
    parts: Parts = {"one": fails, "two": lambda: [{"b": 2}], "late": lambda: [{"c": 3}]}
    notes, left = run(parts, float("inf"), journal)
    assert notes == ["one FAILED after 1 rows: ValueError: no"] and left == []
    assert journal.rows["one"] == [{"a": 1}, {"failed": "ValueError: no", "right": False}]
    assert [*journal.done] == ["two", "late"]
    assert run({"late": parts["late"]}, 0.0, journal)[0] == ["late was skipped: the time budget is used up (--budget)"]


def test_a_part_that_takes_much_too_long_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.suite.EXPECTED", {"one": 0.0})
    journal = Journal(tmp_path / "suite.jsonl")
    journal.begin(SETTING)
    parts: Parts = {"one": lambda: [{"a": 1}, {"a": 2}], "two": lambda: [{"b": 2}]}
    notes, _ = run(parts, float("inf"), journal, patient=False)
    assert notes == ["one was cut off after 1 rows: 3 times its seconds"] and journal.rows["one"] == [{"a": 1}]
    assert [*journal.done] == ["two"], "a later run does it again"
    assert run(parts, float("inf"), journal)[0] == []


def test_every_part_has_its_seconds() -> None:
    assert [*parts_of(Place(torch.device("cpu"), tiny=True), None, dict)] == [*EXPECTED]
    assert sum(seconds for name, seconds in EXPECTED.items() if name not in NOT_BY_DEFAULT) <= 240


def test_targets_are_judged_by_what_was_measured() -> None:
    in_a_row = {"contender": "int4, float16", "linear": "all of a layer in a row", "rows": 1, "us": 41.0}
    speed = {"what": "speed", "model": "int4", "tokens": 2048, "tok_s": 380.0}
    first = {"what": "first token", "prompt": "2048 tokens"}
    parts = {"linears": [in_a_row], "int4": [speed, first | {"ms": 60.0}], "bf16": [first | {"ms": 50.0}]}
    judged = [*targets(parts)]
    met = [row["met"] for row in judged[:-1]]
    assert met == [True, False, False, True, False] and judged[-1] == {"figures": 5, "met": 2}
    assert judged[-2]["is"] == pytest.approx(1.2) and judged[-2]["wanted"] == "<= 1.15"
    assert [*targets({})] == [{"figures": 0, "met": 0}]


def test_what_follows_a_lost_gpu_is_left_to_a_new_process(tmp_path: Path) -> None:
    def lost() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield {}

    journal = Journal(tmp_path / "suite.jsonl")
    journal.begin(SETTING)
    assert run({"one": lost, "two": lambda: [], "three": lambda: []}, float("inf"), journal)[1] == ["two", "three"]
    assert not context_lost(RuntimeError("out of shared memory"))


@pytest.mark.parametrize("workers", [0, 1])
def test_jobs_report_time_and_errors(workers: int) -> None:
    done = {one.job: one.error for one in do_all(json.loads, ["1", "{"], workers)}  # light to import in a new process
    assert done["1"] is None and str(done["{"]).startswith("JSONDecodeError: Expecting property name")


def test_kernels_of_a_profile() -> None:
    def event(name: str, us: float, device: str) -> Any:
        return SimpleNamespace(
            name=name, device_type=f"DeviceType.{device}", time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    events = [event("small_m_kernel", 10.0, "CUDA"), event("small_m_kernel", 30.0, "CUDA"), event("op", 99.0, "CPU")]
    events += [event("nvjet_hsh_64x8", 50.0, "CUDA"), event("rms_norm_kernel", 4.0, "CUDA")]
    spent = kernels_of(events, 2, on_gpu=True)
    assert spent == [Spent("nvjet_hsh_64x8", 25, 0.5), Spent("small_m_kernel", 20, 1), Spent("rms_norm_kernel", 2, 0.5)]
    rows = {row["group"]: row for row in grouped(spent, {"packed linears": 40_000_000}, 3e12, {"context": 1})}
    assert [*rows] == ["dense products", "packed linears", "norms"]
    assert rows["packed linears"]["gb_s"] == pytest.approx(2000)
    assert rows["packed linears"]["of_read"] == pytest.approx(2 / 3) and rows["norms"]["gb_s"] is None


def test_calls_in_turns_find_a_cold_cache() -> None:
    place = Place(torch.device("cuda"), tiny=False)
    assert place.copies(25 << 20) * (25 << 20) >= COLD
    assert place.copies(8192) == MOST_CALLS and place.copies(1 << 30) == 1
    assert Place(torch.device("cpu"), tiny=True).copies(8192) == 1


def test_operations_of_an_image() -> None:
    """Of 1,024 patches in blocks of width 1664 with an MLP of 8192, and of the resampler's 256 queries, at 4096."""
    config = full_config("qwen-vl-chat").visual
    assert (config.num_patches, config.n_queries, config.mlp_width) == (1024, 256, 8192)
    block = 2 * 1024 * (4 * 1664**2 + 2 * 1664 * 8192) + 4 * 1024**2 * 1664
    pool = 2 * 1024 * (1664 * 4096 + 2 * 4096**2) + 2 * 256 * 4096**2 + 4 * 1024 * 256 * 4096
    ends = 2 * 1024 * 588 * 1664 + 2 * 256 * 4096**2
    counts = dict.fromkeys(sizes(config), 1)
    assert operations(config, counts) == block + pool + ends
    in_blocks = [kind for kind in counts if kind.startswith(("attn.", "mlp."))]
    assert operations(config, counts | dict.fromkeys(in_blocks, 48)) == 48 * block + pool + ends
    resampler = {kind: 1 for kind in counts if kind.startswith("attn_pool")}
    assert len(resampler) == 4 and operations(config, resampler) == pool


def test_ways_share_an_engine_that_is_made_as_usual() -> None:
    asked = {question.asked: [way.made_as_usual for way in question.ways] for question in questions()}
    assert all(ways[0] for ways in asked.values())
    assert asked["steps ahead"] == asked["short prompts"] == [True, True]
    assert asked["dependent launches"] == asked["batch invariance"] == asked["dense linears"] == [True, False]
    assert asked["many rows of int4"] == [True, False, False]


def test_no_prompt_that_is_timed_begins_like_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that an engine has cached would not be computed."""
    timed: list[tuple[int, ...]] = []
    monkeypatch.setattr(variants, "make_engine", lambda *_, **__: SimpleNamespace(core=SimpleNamespace(overlap=None)))
    monkeypatch.setattr(variants, "launched", lambda engine: nullcontext())
    monkeypatch.setattr(variants, "tokens_per_second", lambda *_: 1.0)

    def first_token_seconds(place: Place, engine: Any, prompt: dict[str, Any]) -> float:
        timed.append(tuple(prompt["token_ids"]))
        return 1.0

    monkeypatch.setattr(variants, "first_token_seconds", first_token_seconds)
    monkeypatch.setattr(Place, "settle", lambda self: None)
    rows = [*variants.variants(Place(torch.device("cuda"), tiny=False))]
    assert len(timed) == variants.TURNS * sum(row["measure"].startswith("the first") for row in rows) == 81
    block = 16
    assert len({tokens[:block] for tokens in timed}) == len(timed)
    decoded = {tuple(text(variants.CONTEXT, r)["token_ids"][:block]) for r in range(max(variants.REQUESTS))}
    assert not decoded & {tokens[:block] for tokens in timed}


@needs_triton
def test_every_option_rounds_head_and_vision_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.engines import rounded_weights

    monkeypatch.setenv("QVL_KERNELS", "reference")
    config = full_config("qwen-vl-chat-int4")
    visual = replace(config.visual, layers=1, width=416, heads=4, output_dim=256)
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 2048}
    small = replace(config, num_hidden_layers=1, visual=visual, **sizes)
    weights = rounded_weights(small, torch.float16, torch.device("cpu"))
    assert "lm_head" in weights.packed and "lm_head.weight" not in weights.state
    vision = [name for name in weights.packed if name.startswith("transformer.visual.")]
    assert len(vision) >= 4 and not any(f"{name}.weight" in weights.state for name in vision)
