"""The GPU suite where there is no GPU: all of it runs, in the interpreter, and says what it is worth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.bounds import full_config, token_bytes, weight_bytes
from benchmarks.gpu.launches import Recorded, of_a_layer
from benchmarks.gpu.page import page
from benchmarks.gpu.table import MEMORY, SPEED
from benchmarks.gpu.variants import questions

ROOT = Path(__file__).resolve().parents[2]
TOWER = {"ceiling", "features", "tower", "resampler", "product", "attention", "kernel"}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make setup")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QVL_KERNELS")}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, env=clean)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where the suite takes minutes")
@pytest.mark.timeout(600)
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    done = python("benchmarks.gpu.suite", "--out", str(tmp_path), "--budget", "550")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    suite: dict[str, Any] = json.loads((tmp_path / "suite.json").read_text())
    parts = suite["parts"]
    assert [*parts] == [
        "bounds",
        "compile",
        "ceiling",
        "correct",
        "graphs",
        "goldens",
        "linears",
        "small",
        "int4",
        "bf16",
        "tower",
        "variants",
        "int4-options",
        "head",
        "speed",
        "eager",
        "launches",
        "targets",
    ]
    assert [*suite["setting"]["seconds"]] == [*parts]
    assert "no time below is a figure" in suite["notes"][0] and len(suite["notes"]) == 1
    ops = {row["case"].partition(",")[0] for row in parts["correct"]}
    assert {
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "swiglu",
        "gelu",
        "rotary_to_cache",
        "rotary_attention",
        "paged_attention",
        "vision_attention",
        "cross_attention",
        "int4 linear",
        "int4 linear with swiglu",
        "int8 linear",
        "dense linear",
    } == ops
    assert all(row["right"] for part in ("correct", "goldens", "graphs") for row in parts[part])
    assert {row["model"] for row in parts["goldens"]} == {"nano", "nano_int4"}
    for kind in ("int4", "bf16", "int4-options"):
        whats = {"ready", "speed", "memory", "first token", "step", "group", "kernel", "throughput"}
        assert {row["what"] for row in parts[kind]} == whats
    assert all(row["right"] for row in parts["linears"] if "error" in row)
    assert {row["contender"] for row in parts["linears"]} >= {"int4, float16", "dense, bfloat16"}
    assert parts["compile"][0]["error"] is None
    assert all(row["right"] for row in parts["head"]) and {row["linear"] for row in parts["head"]} == {"head"}
    names = {row["kernel"] for row in parts["small"]}
    assert names >= {"attention, merge", "merge", "norm after out", "norm after down", "all of a layer in a row"}
    assert {row["what"] for row in parts["tower"]} == TOWER
    assert {row["right"] for row in parts["tower"] if row["what"] == "features"} == {True}
    ways = {row["by"] for row in parts["tower"] if row["what"] == "attention"}
    assert len(ways) >= 4 and {"built in", "torch's", "the resampler's"} <= ways
    assert {row["weights"] for row in parts["tower"] if row["what"] == "product"} == {"float16", "int8, groups of 128"}
    asked = {row["question"] for row in parts["variants"]}
    assert asked == {question.asked for question in questions()}
    assert all(row["of_default"] > 0 for row in parts["variants"])
    assert parts["targets"][-1]["figures"] == len(parts["targets"]) - 1 > 0
    text = (tmp_path / "suite.md").read_text()
    assert "Triton kernels (interpreted)" in text and "Computed bounds" in text
    again = python("benchmarks.gpu.suite", "--out", str(tmp_path))
    assert again.returncode == 0 and again.stderr.count("# done before: bounds, compile") == 1
    assert json.loads((tmp_path / "suite.json").read_text())["parts"] == parts


@needs_triton
@pytest.mark.interpreter
def test_a_layer_of_a_decode_step_is_eight_launches_at_the_most() -> None:
    done = python("benchmarks.gpu.launches", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    for rows in (1, 16):
        kernels = [launch["kernel"] for launch in seen if launch["rows"] == rows]
        assert 7 <= len(kernels) <= 8, kernels
        assert kernels[0] == "merge_kernel" and "swiglu_kernel" not in kernels and kernels.count("rms_norm_kernel") == 2


def test_a_layer_is_from_merge_to_merge() -> None:
    names = ["norm", "merge_kernel", "attention", "torch add", "merge_kernel", "attention"]
    assert [s.kernel for s in of_a_layer([Recorded(name, 1, 1) for name in names])] == names[1:4]
    with pytest.raises(RuntimeError, match="expected those of at least two layers"):
        of_a_layer([Recorded("merge_kernel", 1, 1)])


def test_bounds_are_the_bytes_of_the_published_model() -> None:
    """4096 * 12288 + 4096^2 + 3 * 4096 * 11008 weights a layer, 32 layers, and a head of 151936 rows in 16 bits."""
    weights = 32 * (4096 * 12288 + 4096**2 + 3 * 4096 * 11008)
    head, norms, biases = 151936 * 4096 * 2, 65 * 4096 * 2, 32 * 12288 * 2
    dense, int4 = full_config("qwen-vl-chat"), full_config("qwen-vl-chat-int4")
    assert weight_bytes(dense) == 2 * weights + head + norms + biases
    packed = weights // 2 + weights // 128 * 2 + weights // 128 // 2  # levels, scales, zero points
    assert weight_bytes(int4) == pytest.approx(packed + head + norms, rel=1e-3)
    assert token_bytes(dense, 2048) - token_bytes(dense, 0) == 2048 * 2 * 32 * 4096 * 2


def test_the_documented_figures() -> None:
    """Of the Qwen-VL README, "Profiling": generating after an image on an A100-SXM4-80G."""
    assert [*SPEED.values()] == [28.87, 24.32, 37.79, 34.34]
    assert [*MEMORY.values()] == [22.60, 28.01, 11.82, 17.23]


def test_the_page() -> None:
    text = page({"device": "a GPU"}, {"graphs": [{"a": 1.23456, "right": True}, {"b": None}]}, ["a note"])
    assert "- device: a GPU" in text and "> a note" in text
    assert re.search(r"\| a \| right \|\n\|---\|---\|\n\| 1\.235 \| yes \|\n\n\| b \|\n\|---\|\n\|  \|", text)


def test_an_unknown_part_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = python("benchmarks.gpu.suite", "--only", "kernals", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "there is no part 'kernals'; there are bounds, compile" in done.stderr
    assert not (tmp_path / "out").exists()
