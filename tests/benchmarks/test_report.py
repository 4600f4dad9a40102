"""The report's page and plots from figures made up here, and the comparison of kernel runs: no measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.__main__ import compared, figures, markdown
from benchmarks.kernels.cases import makers
from benchmarks.report.__main__ import computed
from benchmarks.report.agree import compare, spreads
from benchmarks.report.page import write_page
from benchmarks.report.plots import draw
from benchmarks.report.pool import pooled

pytestmark = pytest.mark.unit


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "samples": 5}


def report() -> dict[str, Any]:
    timings = {"image_s": 0.1, "vision_s": 8.0, "prefill_s": 4.0, "decode_s": 7.0}

    def points() -> list[dict[str, Any]]:
        return [{"x": x, "seconds": spread(0.1 * x)} for x in (1, 2, 4)]

    full = {
        "label": "full-size Int4, fast",
        "note": "a note",
        "kernels": {"ops": "C++ kernels (amx)"},
        "speed": {
            "ceilings": {"read_gb_s": spread(20.0), "gemm_gop_s": spread(900.0), "how": "read"},
            "answer": {
                "tokens": 32,
                "timings": timings,
                "ttft_s": 12.1,
                "tpot_s": {"p50": 0.2, "p95": 0.3, "p99": 0.4},
            },
            "means": [
                {"length": 1792, "tok_s": spread(4.5), "gb_s": 18.0, "of_read": 0.9, "published": 37.79, "how": "steps"}
            ],
            "batches": [{"size": 8, "context": 258, "tok_s": spread(14.0)}],
        },
        "growth": [{"name": n, "axis": "x", "points": points(), "bound": "Memory: x."} for n in ("decode", "prefill")],
        "memory": {
            "parts": {"vision": 2 << 30, "language": 3 << 30},
            "kv_per_token": 1 << 19,
            "cases": [
                {
                    "name": "encode",
                    "tokens": 2048,
                    "peak": 8 << 30,
                    "planned": 81 << 27,
                    "published_gib": 11.82,
                    "how": "computed",
                }
            ],
        },
    }
    return {
        "machine": {
            "device": "cpu (A CPU, 2 threads)",
            "memory_gib": 24.0,
            "system": "Linux 6",
            "python": "3.11.7",
            "torch_version": "2.13.0",
            "qvl": "0.1.0",
            "commit": "abc1234",
            "date": "2026-11-22 10:00",
        },
        "command": "python -m benchmarks.report",
        "minutes": 20.0,
        "passes": 3,
        "models": [full, {"label": "full-size BF16", "skipped": "needs 40 GiB of memory, and 2.0 are free"}],
        "serving": [
            {
                "rate": 2.0,
                "tok_s": 30.0,
                "ttft_s": {"p50": 0.1, "p95": 0.2, "p99": 0.3},
                "tpot_s": {"p50": 0.01, "p95": 0.02, "p99": 0.03},
                "prefix_hit_rate": 0.5,
            },
            {"rate": "one at a time", "tok_s": 20.0},
        ],
        "bounds": computed(),
    }


def test_a_page_shows_every_figure_with_where_it_comes_from(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'qvl-runtime[plot]'")
    made = report()
    images = draw(made, tmp_path)
    write_page(made, images, tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    for wanted in (
        "python -m benchmarks.report",
        "abc1234",
        "A CPU, 2 threads",
        "4.5 (4.05-4.95)",
        "37.79",
        "18.0",
        "90%",
        "11.82",
        "8.00",
        "a note",
        "left out, needs 40 GiB of memory",
        "one at a time",
        "0.1 / 0.2 / 0.3",
        "10.12 (+26.6%)",
        "H100",
        "computed, and what an older version measured",
        "No later version has run on a GPU",
        "172 to 177",
    ):
        assert wanted in page, wanted
    assert set(images) == {"speed.png", "time.png", "memory.png", "serving.png", "growth-full-size-int4-fast.png"}
    for name in images:
        assert f"({name})" in page and (tmp_path / name).stat().st_size > 5000


def test_two_runs_agree_where_their_spreads_meet() -> None:
    one, other, slower = report(), report(), report()
    slower["models"][0]["speed"]["means"][0]["tok_s"] = spread(3.0)
    names = [name for name, _ in spreads(one)]
    assert "full-size Int4, fast: mean over 1792 tokens" in names and len(names) == len(set(names)) == 10
    assert all(row.meet for row in compare(one, other))
    (apart,) = [row for row in compare(one, slower) if not row.meet]
    assert apart.name == "full-size Int4, fast: mean over 1792 tokens" and apart.ratio == pytest.approx(3 / 4.5)
    once = report()
    once["models"][0]["growth"][0]["points"][2]["seconds"]["samples"] = 1
    assert len(compare(once, other)) == len(names) - 1, "what was measured once states no spread"
    one["models"] = one["models"][1:]
    assert compare(one, other) == [], "what only one of them measured"


def test_passes_become_one_whose_spread_holds_them_all() -> None:
    first, second, third = (report()["models"][0] for _ in range(3))
    second["speed"]["means"][0] |= {"tok_s": spread(6.0), "gb_s": 20.0}
    third["speed"]["means"][0] |= {"tok_s": spread(4.0), "gb_s": 19.0}
    for later in (second, third):
        later["memory"], later["note"] = None, "another note"
        del later["growth"][0]["points"][2]
    made = pooled([first, second, third])
    assert made["speed"]["means"][0]["tok_s"] == {
        "median": 4.5,
        "p10": pytest.approx(3.6),
        "p90": pytest.approx(6.6),
        "samples": 15,
    }
    assert made["speed"]["means"][0]["gb_s"] == 19.0 and made["speed"]["means"][0]["length"] == 1792
    assert [point["seconds"]["samples"] for point in made["growth"][0]["points"]] == [15, 15, 5]
    assert made["memory"] == first["memory"] and made["note"] == "a note" and made["growth"][0]["name"] == "decode"
    assert pooled([first]) == first
    skipped = {"label": "x", "skipped": "needs more"}
    assert pooled([skipped]) == skipped


def test_kernel_runs_are_compared_by_name(tmp_path: Path) -> None:
    def run(ours: float) -> dict[str, dict[str, Any]]:
        stats = {"median": ours, "q1": ours, "q3": ours}
        names = [("gelu", "ours", stats), ("gelu", "torch", stats | {"median": 3e-6})]
        benches = [
            {"group": group, "params": {"way": way}, "stats": s, "extra_info": {"gb_s": 1.5, "gop_s": 2.0}}
            for group, way, s in names
        ]
        path = tmp_path / f"{ours}.json"
        path.write_text(json.dumps({"benchmarks": benches}))
        return figures(path)

    (row,) = compared(run(1e-6), run(2e-6))
    assert row == ["gelu", "1 (1-1)", "1.5", "2", "3.00", "2.00"]
    assert compared(run(1e-6), {})[0][-1] == ""
    assert markdown([row]).splitlines()[-1] == "| gelu | 1 (1-1) | 1.5 | 2 | 3.00 | 2.00 |"


def test_every_op_of_the_model_has_its_case() -> None:
    ops = {name.partition(",")[0] for name in makers()}
    assert ops == {
        "int4 linear",
        "dense linear",
        "rms_norm",
        "add_rms_norm",
        "swiglu",
        "decode attention",
        "prefill attention",
        "vision attention",
        "layer_norm",
        "gelu",
    }
