"""The search for configurations of linears: what it tries, what it writes, and where it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import search_space, tune
from benchmarks.gpu.place import Place
from benchmarks.gpu.search_space import candidates, kinds
from benchmarks.gpu.tune import fastest, main, timed, write

pytestmark = pytest.mark.unit
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: `make setup`")
ROOT = Path(__file__).resolve().parents[2]
CPU = Place(torch.device("cpu"), tiny=True)


@pytest.fixture(autouse=True)
def nothing_read() -> Iterator[None]:
    """What a file said, and what the search tried last, ends with each test."""
    yield
    if find_spec("triton") is not None:
        from qvl_kernels.triton.linear.configs import overrides

        overrides.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where it would search for minutes")
def test_without_a_gpu_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "kernels.json")]) == 2 and not (tmp_path / "kernels.json").exists()
    assert "times kernels on a GPU, and torch finds none here" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize("inputs, outputs", [(4096, 12288), (11008, 4096), (256, 384)])
def test_candidates_are_what_the_kernels_take(inputs: int, outputs: int) -> None:
    from qvl_kernels.triton.linear.configs import _valid, config

    few, many = ([*candidates(kind, 80, inputs, outputs)] for kind in ("small_m", "gemm"))
    assert few[0] == config(80, "small_m", 1, inputs, outputs)
    assert len(few) > 8 and len(many) > 8 and len({*few}) == len(few)
    assert all(_valid("small_m", [*made]) and outputs % made.columns == 0 for made in few)
    assert all(_valid("gemm", [*made]) and outputs % made.columns == 0 for made in many)
    assert all(1 <= made.splits <= -(-inputs // 128) for made in many)
    assert all(made.rows * made.columns // (32 * made.warps) <= 64 for made in many)  # sums of a thread
    dense, wgmma = ([*candidates(kind, 90, inputs, outputs)] for kind in ("dense", "wgmma"))
    assert dense[0] == config(90, "dense", 1, inputs, outputs, 16) and wgmma[0] == config(
        90, "wgmma", 512, inputs, outputs
    )
    assert len(dense) > 8 and all(_valid("dense", [*made]) for made in dense)
    assert len(wgmma) > 8 and all(_valid("wgmma", [*made]) for made in wgmma)
    assert not _valid("gemm", [64, 128, 4, 1, 1]) and _valid("gemm", [64, 128, 4, 2, 1])
    assert not _valid("wgmma", [128, 128, 8, 2, 1]) and not _valid("wgmma", [128, 128, 2, 4, 1])


@needs_triton
def test_only_a_gpu_with_wgmma_is_searched_for_it() -> None:
    assert kinds(90) == ["small_m", "dense", "gemm", "wgmma"]
    assert kinds(80) == ["small_m", "dense", "gemm"]


@needs_triton
def test_the_best_is_what_a_file_then_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl_kernels.triton.linear.configs import config, overrides

    tried = [*candidates("small_m", 90, 4096, 4096)]
    best, seconds = fastest(tried, lambda made: None if made == tried[0] else 1.0 / made.warps)
    assert (best.warps, seconds) == (8, 0.125)
    with pytest.raises(RuntimeError, match="no configuration runs on this GPU"):
        fastest(tried, lambda made: None)
    file = tmp_path / "kernels.json"
    write(file, 80, {"small_m 4096 4096": [8, 64, 8, 4, 6]})
    write(file, 90, {"small_m 4096 4096": [*best]})
    monkeypatch.setenv("QVL_KERNEL_CONFIGS", str(file))
    overrides.cache_clear()
    assert config(90, "small_m", 1, 4096, 4096) == best != tried[0]
    assert config(80, "small_m", 1, 4096, 4096).stages == 4


DRY_RUN = """
from benchmarks.gpu import search_space

search_space.GRID = {
    "small_m": ((8,), (32,), (4,), (1,)),
    "dense": ((8,), (16,), (8,), (1,)),
    "gemm": ((64,), (256,), (8,), (2, 9)),
    "wgmma": ((64,), (128,), (4,), (3, 0)),
}

import json
from benchmarks.gpu.dry_run.search import TARGETS, check_share, shares, summary

said = {}
for target in TARGETS:
    checked = [one for share in shares(target, "out") for one in check_share(share)]
    said[target] = [summary(target, checked), [[one.label, [*one.config], one.fault] for one in checked]]
print(json.dumps(said))
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_candidates_are_compiled_without_a_gpu() -> None:
    """Two that cannot run are among them: nine buffers of a large tile, and none."""
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "QVL_KERNELS")}
    done = subprocess.run([sys.executable, "-c", DRY_RUN], capture_output=True, text=True, cwd=ROOT, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for target, count in (("A100-SXM4-80GB", 3), ("H100 80GB HBM3", 4)):
        line, checked = said[target]
        assert len({label for label, _, _ in checked}) == count and line.startswith(f"{target}: {len(checked)} candid")
        assert not any(fault for label, _, fault in checked if label.startswith(("small_m", "dense")))
        large = [fault for label, config, fault in checked if label.startswith("gemm") and config[3] == 9]
        assert large and all("of shared memory, and there are" in fault for fault in large)
    line, checked = said["H100 80GB HBM3"]
    none = [fault for label, config, fault in checked if label.startswith("wgmma") and config[3] == 0]
    assert none and all(fault.startswith("does not compile: ") for fault in none)
    assert f" {len(none)} do not compile" in line


def test_a_pattern_may_match_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as wgmma's kernel on an A100."""
    assert main(["--dry-run", "--only", "none of them"]) == 0
    assert "A100-SXM4-80GB: 0 candidates in 0 kernels" in capsys.readouterr().out


def test_a_dry_run_takes_no_file_and_a_search_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "name the file to write, or ask for a --dry-run" in capsys.readouterr().err


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("kind, count", [("small_m", 3), ("gemm", 2), ("dense", 2), ("wgmma", 2)])
def test_costs_are_taken_of_right_numbers_only(kind: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_space, "ROWS", {"small_m": 2, "gemm": 20, "dense": 2, "wgmma": 20})
    key = (80, f"{kind} 256 256")
    cost = timed(CPU, 1e9, kind, 256, 256, key)
    for made in islice(candidates(kind, 80, 256, 256), count):
        assert cost(made)
    from qvl_kernels.triton.linear.configs import overrides

    assert overrides()[key] == made, "the kernel did not run as the file would have it"
    original = search_space.operands

    def halved(*given: Any) -> Any:
        x, weight, dense = original(*given)
        return x, weight, dense / 2

    monkeypatch.setattr(tune, "operands", halved)
    with pytest.raises(RuntimeError, match="computes wrong numbers as Config"):
        timed(CPU, 1e9, kind, 256, 256, key)(made)
