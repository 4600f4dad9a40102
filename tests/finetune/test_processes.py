"""Two processes over gloo give what one gives, with replicated and with sharded weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.parallel import joined_team
from qvl_runtime.finetune.run import Finetuning
from qvl_runtime.finetune.trainer import StoppedError
from tests.finetune.test_keeping import divided
from tests.finetune.test_trainer import LORA, data

__all__ = ["data"]
pytestmark = pytest.mark.cpu
BASE = FinetuneOptions(
    epochs=2, accumulate=3, pack=False, rate=1e-3, dtype="float32", lora=LORA, save_every=2, checkpointing=False
)


def work(
    source: Path, data: Path, out: Path, options: FinetuneOptions, keep: Path | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined_team(options.sharding) as team:
        Finetuning.open(source, data, out, options, keep=keep).run(team)


def run_two(*arguments: Any, target: Callable[..., None] = work) -> None:
    """Run `target` in two forked processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("fork")
    members = [
        context.Process(target=target, args=(*arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(2)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
        assert member.exitcode == 0


def column(folder: Path, name: str) -> list[float]:
    return [json.loads(line).get(name, 0.0) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return column(folder, "loss")


@pytest.mark.parametrize(
    ("method", "sharding"),
    [("lora", "data"), ("full", "data"), ("full", "gradients"), ("lora", "fsdp"), ("full", "fsdp")],
)
def test_two_processes_equal_one(method: Any, sharding: str, source: Path, data: Path, tmp_path: Path) -> None:
    options = replace(BASE, method=method)
    Finetuning.open(source, data, tmp_path / "one", options).run()
    run_two(source, data, tmp_path / "two", replace(options, sharding=sharding), None)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharding", ["data", "fsdp"])
def test_two_processes_keep_what_one_keeps(sharding: str, source: Path, data: Path, tmp_path: Path) -> None:
    learn, keep = divided(data)
    options = replace(BASE, method="full")
    Finetuning.open(source, learn, tmp_path / "one", options, keep=keep).run()
    run_two(source, learn, tmp_path / "two", replace(options, sharding=sharding), keep)
    one, two = (column(tmp_path / folder, "divergence") for folder in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-6) and max(one) > 1e-4


def stopped(source: Path, data: Path, out: Path, options: FinetuneOptions, environment: dict[str, str]) -> None:
    """A run whose second process is asked to stop, as by a signal that reaches it alone."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined_team(options.sharding) as team, pytest.raises(StoppedError, match="after step 1 of 4"):
        Finetuning.open(source, data, out, options).run(team, on_start=lambda t: t.stop() if team.rank else None)


@pytest.mark.parametrize("sharding", ["data", "fsdp"])
def test_a_stop_reaches_all_and_another_number_resumes(sharding: str, source: Path, data: Path, tmp_path: Path) -> None:
    options = replace(BASE, method="full", save_every=100)
    run_two(source, data, tmp_path / "parts", replace(options, sharding=sharding), target=stopped)
    assert [path.name for path in (tmp_path / ".parts.partial" / "states").iterdir()] == ["step-00000001"]
    saved_by: list[int | None] = []
    for name in ("parts", "whole"):
        job = Finetuning.open(source, data, tmp_path / name, options)
        job.run(on_start=lambda trainer: saved_by.append(trainer.saved_by))
    assert saved_by == [2, None]
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


def test_what_does_not_go_together_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="start it by torchrun"), joined_team("data"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes.*'data'"), joined_team("none"):
        pass
