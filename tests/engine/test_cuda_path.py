"""The CUDA path on a machine without a GPU: it imports, plans, and raises errors that say what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qvl_kernels
from qvl_kernels import UnsupportedError, ops_for, reference, report
from qvl_runtime import Engine, host
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.engine import capacity, warm_up
from qvl_runtime.errors import ConfigError
from qvl_runtime.plan.sizes import IMAGES_AT_ONCE
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.scheduler import StepLimits
from tests.schedule.small import small_config

pytestmark = pytest.mark.unit
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make this machine look like one with a given GPU and given packages."""

    def like(capability: tuple[int, int] = (8, 0), triton: bool = True, **environment: str) -> None:
        for name in ("QVL_KERNELS", "TRITON_INTERPRET"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(qvl_kernels, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9.0")

    return like


def test_auto_is_the_gpu_and_its_kernels_are_named(machine: Machine) -> None:
    machine((9, 0))
    assert host.choose_device("auto").type == "cuda"
    assert report(GPU) == {
        "ops": "Triton kernels (sm_90)",
        "why": "NVIDIA A100-SXM4-80GB has compute capability 9.0; triton 3.9.0",
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "old GPU": (
        {"capability": (7, 5)},
        r"cuda:0 \(NVIDIA A100-SXM4-80GB\) has compute capability 7\.5; the GPU kernels need 8\.0 or higher .*: "
        r"use device='cpu', or set QVL_KERNELS=reference",
    ),
    "no triton": (
        {"triton": False},
        r"the kernels for cuda:0 need triton, which is not installed: pip install 'qvl-runtime\[cuda\]' "
        r"\(in a checkout: make setup\), or use device='cpu', or set QVL_KERNELS=reference",
    ),
    "interpreter": (
        {"TRITON_INTERPRET": "1"},
        r"TRITON_INTERPRET is set, which would run the kernels for cuda:0 .*: unset it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_gpu_that_cannot_be_used_is_refused_and_not_replaced(machine: Machine, case: str) -> None:
    looks, words = REFUSED[case]
    machine(**looks)
    for ask in (ops_for, report):
        with pytest.raises(UnsupportedError, match=words):
            ask(GPU)
    for name in ("cuda", "cuda:0", "auto"):
        with pytest.raises(ConfigError, match=words.replace("cuda:0", "cuda(:0)?")):
            host.choose_device(name)


def test_plain_torch_on_a_gpu_is_had_by_asking(machine: Machine) -> None:
    machine((7, 0), triton=False, QVL_KERNELS="reference")
    assert ops_for(GPU) is reference
    assert report(GPU)["ops"] == "reference (plain torch)"


def test_a_setting_of_the_gpu_kernels_is_checked_first(machine: Machine) -> None:
    machine((9, 0), QVL_INT4_WGMMA="many")
    with pytest.raises(
        ConfigError, match=r"QVL_INT4_WGMMA is 'many'; expected rows such as '33-1023', or '0' for none"
    ):
        Engine(device="cuda")


def test_a_file_of_configurations_is_checked_first(machine: Machine, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: `make setup`")
    from qvl_kernels.triton.linear import configs  # while the interpreter is set, which the rest of the process uses

    configs.overrides.cache_clear()
    machine((9, 0), QVL_KERNEL_CONFIGS=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"QVL_KERNEL_CONFIGS names .*none\.json, which cannot be read"):
        Engine(device="cuda")


def test_without_a_gpu_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"device is 'cuda', but there is no usable GPU .*: use device='cpu'"):
        Engine(device="cuda")


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(qvl_kernels, "find_spec", lambda name: object())
    with pytest.raises(UnsupportedError, match="set TRITON_INTERPRET=1 as well, before Python starts"):
        ops_for(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report(CPU)["ops"] == "Triton kernels (interpreted)"


@pytest.mark.parametrize(
    "name", ["schedule.cuda_graphs", "schedule.decode_graphs", "engine.warm_up", "engine.capacity"]
)
def test_it_imports_without_cuda(name: str) -> None:
    assert importlib.import_module(f"qvl_runtime.{name}").__doc__


def test_an_engine_on_the_cpu_does_not_import_triton() -> None:
    code = """
import sys, torch, qvl_kernels, qvl_runtime, qvl_runtime.engine.engine, qvl_runtime.schedule.cuda_graphs
qvl_runtime.Engine(device="cpu", max_model_len=64)
print("triton" in sys.modules, "qvl_kernels.triton" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


class FakeMeter:
    """Reports `free` bytes as free, and the values of `grown` as memory growth, one per measurement."""

    def __init__(self, free: int, *grown: int) -> None:
        self.left, self.growth, self.begun = free, [*grown], 0

    def begin(self) -> None:
        self.begun += 1

    def grown(self) -> int:
        return self.growth[self.begun - 1]

    def free(self) -> int:
        return self.left


def test_the_warm_up_runs_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most images, most tokens, most rows of logits; the cache that it ran on is not counted."""
    engine = Engine(device="cpu", dtype="float32", max_model_len=64)
    model, steps, ran = engine.core.runner.model, StepLimits(tokens=40, running=7), {}  # type: ignore[var-annotated]
    encode, forward, logits = model.encode_images, model.forward, model.logits
    monkeypatch.setattr(model, "encode_images", lambda x: ran.update(images=len(x)) or encode(x))
    monkeypatch.setattr(model, "forward", lambda step, *a: ran.update(rows=len(step.token_ids)) or forward(step, *a))
    monkeypatch.setattr(model, "logits", lambda x: ran.update(logits=len(x)) or logits(x))
    cache = KVCache(model.config, 40, torch.float32, CPU)
    held = sum(t.nbytes for layer in cache.layers for t in layer)
    assert warm_up.workspace_bytes(model, torch.float32, steps, FakeMeter(0, 5000, held + 7000)) == 7000
    assert warm_up.workspace_bytes(model, torch.float32, steps, FakeMeter(0, 9000, held + 7000)) == 9000
    assert ran == {"images": IMAGES_AT_ONCE, "rows": 40, "logits": 7}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Callable[[int, int], int | None]:
    """Bytes left for the KV cache, by a GPU's free bytes and the workspace of one step."""

    def spare(free: int, workspace: int, **asked: Any) -> int | None:
        machine()
        model: Any = SimpleNamespace(device=GPU, config=small_config())
        monkeypatch.setattr(capacity, "CudaMeter", lambda _: FakeMeter(free))
        monkeypatch.setattr(capacity, "workspace_bytes", lambda *_: workspace)
        return capacity.spare_bytes(model, EngineConfig(**asked), torch.float16)

    return spare


def test_the_kv_cache_gets_what_a_step_leaves(measured: Callable[..., int | None]) -> None:
    gib = 1 << 30
    spare = measured(60 * gib, 3 * gib, image_cache_bytes=gib)
    assert spare == 60 * gib - 3 * gib - gib - warm_up.MARGIN
    assert capacity.kv_cache_tokens(EngineConfig(), 512 * 1024, 8192, 0, spare) == spare // (512 * 1024)
    assert measured(60 * gib, 3 * gib, kv_cache_bytes=gib) is None, "what was asked for needs no measurement"


def test_a_gpu_too_small_is_refused_with_the_numbers(measured: Callable[..., int | None]) -> None:
    gib = 1 << 30
    with pytest.raises(ConfigError, match=r"has 4,096 MiB left .* needs 3,072, .* 256 .* 1024: lower max_step_tokens"):
        measured(4 * gib, 3 * gib)


def test_a_small_cache_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert capacity.kv_cache_tokens(EngineConfig(), 1024, 8192, 0, 1024 * 100) == 100
    assert "fewer than the context's 8192" in caplog.text


def test_no_graphs_on_a_cpu_for_plain_torch_or_where_refused(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine()
    captured: list[tuple[int, int]] = []
    monkeypatch.setattr(capacity, "CudaCapture", lambda _: "capture")

    def runner(at: torch.device, ops: Any) -> Any:
        return SimpleNamespace(
            model=SimpleNamespace(device=at, ops=ops),
            cache=SimpleNamespace(num_slots=4096),
            capture=lambda capture, most, longest: captured.append((most, longest)),
            capture_prefill=lambda capture, most, longest: captured.append((most, longest)),
        )

    for at, ops, asked in (
        (CPU, "kernels", EngineConfig()),
        (GPU, reference, EngineConfig()),
        (GPU, "kernels", EngineConfig(graphs=False)),
    ):
        capacity.capture_graphs(runner(at, ops), asked, 8192)
    assert captured == []
    capacity.capture_graphs(runner(GPU, "kernels"), EngineConfig(max_running=48, max_step_tokens=1024), 8192)
    assert captured == [(48, 4096), (1024, 4096)], "a table is no wider than the cache"


def test_batch_invariant_takes_its_ops_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch_invariant": True, "max_model_len": 256}
    assert Engine(**options).core.runner.model.ops is ops_for(CPU), "a CPU needs no option"
    monkeypatch.setenv("QVL_KERNELS", "reference")
    with pytest.raises(ConfigError, match="torch multiplies bfloat16 here"):
        Engine(dtype="bfloat16", **options)
    if importlib.util.find_spec("triton") is None:
        return
    monkeypatch.setenv("QVL_KERNELS", "triton")
    from qvl_kernels.triton import invariant

    runner = Engine(dtype="float16", **options).core.runner
    assert runner.model.ops is invariant and runner.images_at_once == 1 and runner.prefill_graphs is None
    with pytest.raises(ConfigError, match="torch multiplies float32 here"):
        Engine(dtype="float32", **options)
