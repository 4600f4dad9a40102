"""A quantization that is stopped or killed at any moment resumes and produces the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qvl_runtime.errors import CheckpointError
from qvl_runtime.quantize.quantizer import Quantizer
from tests.quantize.quantized import FEW, digest, run

pytestmark = pytest.mark.cpu


class Stopped(BaseException):
    pass


def test_stopped_after_any_linear_it_resumes_and_gives_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    def stop_at(linear: int) -> Callable[[int], None]:
        def progress(done: int) -> None:
            started.append(done)
            if done == linear:
                raise Stopped

        return progress

    for linear in (0, 3, 5, 9, 10):
        started: list[int] = []
        with pytest.raises(Stopped):
            Quantizer.open(source, tmp_path / "out", FEW).run(stop_at(linear))
        assert not (tmp_path / "out").exists()
    started = []
    Quantizer.open(source, tmp_path / "out", FEW).run(stop_at(-1))
    assert started[0] == 5  # the first layer was not done again
    assert digest(tmp_path / "out") == digest(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_killed_at_ten_random_moments_nothing_looks_whole_that_is_not(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    target, rng, wanted = tmp_path / "out", random.Random(7), digest(whole)
    began = time.perf_counter()
    run(source, tmp_path / "timed")
    took = time.perf_counter() - began
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                run(source, target)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists():
            assert digest(target) == wanted
            shutil.rmtree(target)
    run(source, target)
    assert digest(target) == wanted


def test_another_run_in_progress_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        Quantizer.open(source, tmp_path / "out", FEW).run(stop)
    with pytest.raises(CheckpointError, match=r"0 layers .* other settings \(bits 4 instead of 8\).*remove the folder"):
        run(source, tmp_path / "out", replace(FEW, bits=8))
