"""`qvl profile` on the shipped nano: its figures count what they claim to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qvl_runtime import Engine
from qvl_runtime.cli.app import app
from qvl_runtime.errors import CapacityError, ConfigError
from qvl_runtime.host import peak_memory, reset_peak_memory
from qvl_runtime.profile import steps
from qvl_runtime.profile.growth import growth, slope
from qvl_runtime.profile.memory import encode
from qvl_runtime.profile.run_info import Ceilings, RunInfo
from qvl_runtime.profile.speed import profile_speed
from qvl_runtime.profile.spread import Spread, percentiles

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
CEILINGS = Ceilings(Spread(10.0, 9.0, 11.0, 3), Spread(100.0, 90.0, 110.0, 3), "made up")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(max_model_len=2048, kv_cache_bytes=4096 * 4096)


def test_a_spread_is_that_of_its_samples_and_a_rate_turns_it_round() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spread.median == 3 and spread.p10 == pytest.approx(1.4) and spread.p90 == pytest.approx(4.6)
    rate = spread.rate(6.0)
    assert (rate.median, rate.p10) == (2.0, pytest.approx(6 / 4.6)) and rate.p10 < rate.median < rate.p90  # type: ignore[comparison-overlap]
    assert percentiles([]) == {} and percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    with pytest.raises(ValueError, match="at least one sample"):
        Spread.of([])


def test_a_slope_is_what_a_line_rises_by() -> None:
    line = {x: Spread(0.5 + 0.25 * x, 0, 0, 1) for x in (1, 2, 4, 8)}
    assert slope(line) == pytest.approx(0.25)


def test_a_decode_step_leaves_the_engine_as_it_was(engine: Engine) -> None:
    cache = engine.core.runner.cache
    before = cache.free_tokens
    spreads = steps.decode(engine, [16, 500], batch=3, rounds=2)
    assert [s.samples for s in spreads.values()] == [2, 2] and all(s.median > 0 for s in spreads.values())
    assert cache.free_tokens == before
    cache.check_integrity()


def test_a_step_at_a_written_context_sees_that_many_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(engine.core.runner, "graphs", None)  # a replay calls no Python function to observe
    model = engine.core.runner.model
    forward = model.forward

    def watched(step: object, *rest: object) -> torch.Tensor:
        seen.append(step.layout.context_lens[0])  # type: ignore[attr-defined]
        return forward(step, *rest)

    model.forward = watched  # type: ignore[method-assign,assignment]
    try:
        steps.decode(engine, [40, 7], rounds=1)
    finally:
        del model.forward
    assert seen == [41, 8, 41, 8]


def test_a_batch_beyond_the_cache_is_an_error_with_the_numbers(engine: Engine) -> None:
    with pytest.raises(CapacityError, match=r"64 sequences of 500 tokens need 32768 slots"):
        steps.decode(engine, [500], batch=64)
    with pytest.raises(ConfigError, match=r"tokens is 5000; expected 2 to"):
        profile_speed(engine, tokens=5000)


def test_bytes_of_a_step_are_weights_and_cache(engine: Engine) -> None:
    parts, per_token = engine.report()["memory"], engine.core.runner.cache.bytes_per_token
    weights = parts["language"] + parts["head"]
    assert steps.bytes_read(engine, 100, 2) == weights + 200 * per_token


def test_speed_of_an_answer_and_along_a_length(engine: Engine) -> None:
    report = profile_speed(engine, tokens=6, lengths=(1000, 7934), batches=(1, 2), rounds=1, ceilings=CEILINGS)
    assert report.answer.tokens == 6 and report.weights == "bf16"
    assert [mean.length for mean in report.means] == [1000]
    assert "not generated" in report.means[0].how and report.means[0].published is None
    assert any("7934 tokens do not fit" in note for note in report.notes)
    assert [batch.size for batch in report.batches] == [1, 2]
    timings = report.answer.timings
    parts = (timings.image_s, timings.vision_s, timings.prefill_s, timings.decode_s)
    assert [*report.answer.split.values()] == [*parts] and report.answer.ttft_s > 0


def test_a_length_that_was_generated_is_not_sampled(engine: Engine) -> None:
    report = profile_speed(engine, tokens=12, lengths=(8,), batches=(), rounds=1, ceilings=CEILINGS)
    assert report.means[0].how == "8 tokens generated"


def test_growth_has_its_four_curves_with_a_bound_each(engine: Engine) -> None:
    curves = growth(engine, CEILINGS, quick=True)
    assert [curve.name for curve in curves] == ["decode", "prefill", "batch", "images"]
    for curve in curves:
        assert len(curve.points) == 2 and curve.bound.startswith(("Memory:", "Arithmetic:", "Tokens"))
        assert all(math.isfinite(point.seconds.median) for point in curve.points)


def test_peak_memory_is_seen_and_can_be_reset() -> None:
    reset_peak_memory()
    before = peak_memory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = peak_memory(CPU)
    assert grown - before > 48 << 20
    del held
    reset_peak_memory()
    assert peak_memory(CPU) <= grown


def test_encoding_takes_as_many_tokens_as_it_says(engine: Engine) -> None:
    span = engine.config.visual.n_queries + 2
    assert encode(engine, span + 40) == "one image and text, computed"
    assert encode(engine, span - 1) == "text, computed"


def test_ceilings_are_measured_and_described() -> None:
    ceilings = Ceilings.measure(CPU, torch.bfloat16, rounds=1)
    assert 0.1 < ceilings.read_gb_s.median < 1e4 and ceilings.gemm_gop_s.median > 0.1 and "read" in ceilings.how


def test_run_info_has_device_and_date() -> None:
    info = RunInfo.collect(CPU)
    assert info.device.startswith("cpu (") and info.torch_version == torch.__version__ and len(info.date) == 16


def test_the_command_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(app, ["profile", "memory", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)["memory"]
    assert [case["name"] for case in report["cases"]] == ["load", "encode", "generate"]
    assert report["cases"][1]["peak"] > report["base"] / 2
    load, encode_, generate_ = (case["planned"] for case in report["cases"])
    assert load is None and report["base"] < encode_ < generate_, "the cache fills up meanwhile"
    invalid = CliRunner().invoke(app, ["profile", "speed", "--batch", "two"])
    assert invalid.exit_code == 2 and "expected whole numbers" in invalid.output
