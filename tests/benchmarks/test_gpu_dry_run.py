"""The GPU suite on a GPU that is only pretended: what it would run, it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.dry_run.binding import Bound
from benchmarks.gpu.dry_run.cuda import Event, pretended_cuda
from benchmarks.gpu.dry_run.indexing import get_item, set_item
from benchmarks.gpu.dry_run.tensors import pretended_tensors

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ceiling", "small", "tower", "targets")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make setup")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run_python(*command: str) -> str:
    """Standard output of Python in a process that compiles Triton's kernels, and does not interpret them."""
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "QVL_KERNELS")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.timeout(300)
def test_parts_run_as_on_an_h100(tmp_path: Path) -> None:
    """Kernels that Triton binds, and the lines that only a GPU reaches."""
    command = ("-m", "benchmarks.gpu.suite", "--dry-run", "bind", "--out", str(tmp_path), "--only", ",".join(PARTS))
    run_python(*command)
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert suite["notes"] == [
        "A GPU was pretended: there are no numbers behind the shapes, and no time below is a figure."
    ]
    assert [*suite["parts"]] == [*PARTS] == [*suite["setting"]["seconds"]]
    assert "H100" in suite["setting"]["device"] and suite["setting"]["ops"] == "Triton kernels (sm_90)"
    counts = {name: rows[-1] for name, rows in suite["parts"].items()}
    assert all("right" not in row for rows in suite["parts"].values() for row in rows)
    assert counts["small"]["kernels"] >= 6 and counts["small"]["launched_in_graphs"] > 100
    assert {row["images"] for row in suite["parts"]["tower"] if "images" in row} == {1, 8}
    assert counts["tower"]["kernels"] >= 12 and counts["tower"]["launched_in_graphs"] > 100


ENGINE = """
from benchmarks.gpu.dry_run import pretended_gpu

with pretended_gpu() as bound:
    import json
    from qvl_runtime import Engine, SamplingParams
    from qvl_runtime.config.model import ModelConfig
    from qvl_runtime.engine.engine import NANO
    from qvl_runtime.plan.gpus import Device
    from qvl_runtime.plan.options import Workload, checkpoint_options
    from qvl_runtime.plan.plan import Plan
    from qvl_runtime.profile.memory import includes_image, profile_memory

    path = NANO.parent / "nano_int4"
    options = {"dtype": "float16", "max_model_len": 256, "kv_cache_bytes": 16 << 20, "max_running": 8}
    engine = Engine(path, device="cuda", **options)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prompts = [{"token_ids": [*range(1, 100)]}, {"token_ids": [*range(5, 15)]}]
    lengths = [len(answer.token_ids) for answer in engine.generate(prompts, params)]
    plan = Plan(ModelConfig.from_folder(path), checkpoint_options(path, "float16"), "cuda")
    memory, slots = profile_memory(lambda: engine, 0), engine.core.runner.cache.num_slots
    encoded, generated = memory.cases[1:]
    longest = Workload(slots, encoded.tokens, int(includes_image(engine, encoded.tokens)))
    said = {
        "profile": {"parts": memory.parts, "kv": memory.kv_per_token},
        "planned": [case.planned for case in (encoded, generated)],
        "peak": plan.peak(longest, Device("", 0, None, 0)).total,
        "report": engine.report(),
        "plan": plan.weights,
        "kv": plan.kv_per_token,
        "lengths": lengths,
        "replays": engine.core.runner.graphs.replays,
        "prefills": engine.core.runner.prefill_graphs.replays,
        "overlap": engine.core.overlap is not None,
        "kernels": sorted({key[0] for key in bound.sources}),
    }
print(json.dumps(said))
"""


@needs_triton
@pytest.mark.timeout(300)
def test_an_engine_runs_as_on_an_h100_and_plan_profile_and_report_agree() -> None:
    said = json.loads(run_python("-c", ENGINE).splitlines()[-1])
    report, plan = said["report"], said["plan"]
    assert said["lengths"] == [4, 4] and said["replays"] > 0 and said["prefills"] > 0 and said["overlap"]
    assert {"small_m_kernel", "merge_kernel", "decode_kv_fp16_kernel"} <= {*said["kernels"]}
    assert report["device"] == "cuda:0 (NVIDIA H100 80GB HBM3)" and report["kernels"]["ops"] == "Triton kernels (sm_90)"
    assert report["memory"]["kv_per_token"] == said["kv"]
    for part, nbytes in plan.items():
        assert report["memory"][part] == pytest.approx(nbytes, rel=0.01), part
    assert said["profile"]["kv"] == said["kv"]
    assert said["profile"]["parts"] == {part: report["memory"][part] for part in said["profile"]["parts"]}
    assert said["planned"] == [said["peak"]] * 2 and said["peak"] > said["kv"] * 256 + sum(plan.values())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> object:
    """A pretended device, without Triton."""
    bound = Bound()
    with pretended_cuda(bound), pretended_tensors():
        yield bound


X = torch.arange(5 * 6 * 7).view(5, 6, 7).float()
AT = torch.tensor([1, 2])
KEYS = [
    0,
    -1,
    (0, 1),
    slice(1, 3),
    (slice(None), slice(2, 4)),
    (slice(None, None, 2),),
    (None, 0),
    (..., 0),
    (..., None, slice(1, 2)),
    (0, ..., 1),
    AT,
    (slice(None), AT),
    (AT, AT),
    (slice(None), AT, None),
    (..., AT),
    X[:, 0, 0] > 60,
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_is_torchs(key: object) -> None:
    assert torch.equal(get_item(X, key), X[key])  # type: ignore[index]
    ours, torchs = X.clone(), X.clone()
    set_item(ours, key, 3)
    torchs[key] = 3  # type: ignore[index]
    assert torch.equal(ours, torchs)


def test_too_many_indices_are_refused() -> None:
    with pytest.raises(IndexError):
        get_item(X, (0, 0, 0, 0))


def test_devices_must_match(pretended: Bound) -> None:
    on_gpu = torch.randn(3, 4, device="cuda")
    assert on_gpu.device == torch.device("cuda", 0) and (on_gpu @ on_gpu.T).shape == (3, 3)
    with pytest.raises(RuntimeError, match="same device"):
        on_gpu + torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="reduction dim"):
        on_gpu @ on_gpu
    with pytest.raises(RuntimeError, match="cannot pin"):
        on_gpu.pin_memory()


def test_what_is_read_on_the_host_is_zero_or_true(pretended: Bound) -> None:
    made = torch.tensor([[1, 2]], device=torch.device("cuda", 0))
    assert made.tolist() == [[0, 0]] and made.sum().item() == 0 and bool((made > 0).all())
    host = torch.ones(2, pin_memory=True)
    host.copy_(made[0], non_blocking=True)
    assert host.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="broadcast"):
        made.copy_(torch.zeros(3))


def test_a_graph_replays_what_was_captured(pretended: Bound) -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    with torch.cuda.graph(graph):
        pretended.launch("a")
        pretended.launch("b")
    graph.replay()
    graph.replay()
    assert pretended.names == ["a", "b"] * 2 and (pretended.eager, pretended.replayed) == (0, 4)


def test_events_without_times_have_none() -> None:
    with pytest.raises(RuntimeError, match="enable_timing"):
        Event().elapsed_time(Event())
