"""The processes that decode images: started, used again, killed, replaced, and gone with their parent (FAULTS H5)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serving import hostile_images as hostile
from qvl_runtime.cores import Cores
from qvl_runtime.errors import ConfigError, ImageError
from qvl_runtime.prompt import images, limits
from qvl_runtime.prompt.cancellation import Canceled, Cancellation
from qvl_runtime.prompt.images import ImageReader, load_image
from qvl_runtime.prompt.isolation import pool as pool_module
from qvl_runtime.prompt.isolation import process
from qvl_runtime.prompt.isolation.pool import Pool
from qvl_runtime.prompt.limits import CAN_ISOLATE, ImageLimits

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not CAN_ISOLATE, reason="needs a POSIX system")]
ISOLATED = ImageLimits(isolate_images=True)
SLOW_JPEG = hostile.progressive_jpeg(1000, 20_000)  # some 10 s


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (53, 37)).save(file, kind)
    return file.getvalue()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split(")")[1][1] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def pool_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Pool]]:
    """Makes a pool for a number of cores, which `load_image` uses."""
    pools = list[Pool]()

    def made(cores: int) -> Pool:
        monkeypatch.setattr(pool_module, "usable_cores", lambda: Cores(cores, cores, None, 1))
        pools.append(Pool())
        monkeypatch.setattr(images, "shared_pool", lambda: pools[-1])
        return pools[-1]

    yield made
    for pool in pools:
        pool.close()


def seen_by_clients(pool: Pool, count: int) -> set[int]:
    """The processes that run while clients have a small image decoded six times each."""
    seen = set[int]()

    def read(_: int) -> None:
        for _ in range(6):
            load_image(encoded("PNG"), 28, ISOLATED)
            seen.update(pool.pids())

    with ThreadPoolExecutor(count) as clients:
        list(clients.map(read, range(count)))
    return seen


class TestWorkers:
    def test_one_is_started_when_it_is_needed_and_used_again(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool_module, "_QUICK_S", 30.0)  # none is slow, however busy the machine is
        assert pool.pids() == []
        load_image(encoded("PNG"), 28, ISOLATED)
        first = pool.pids()
        with pytest.raises(ImageError):
            load_image(b"no image", 28, ISOLATED)
        load_image(encoded("JPEG"), 28, ISOLATED)
        assert pool.pids() == first and len(first) == 1

    def test_many_at_once_are_used_again_and_most_of_them_end_when_they_are_idle(
        self, pool_for: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A start takes longer than a small image, so none is started for each of some clients' images."""
        pool = pool_for(8)
        monkeypatch.setattr(pool_module, "_IDLE_S", 1.0)
        monkeypatch.setattr(pool_module, "_QUICK_S", 30.0)  # none is slow, however busy the machine is
        seen = seen_by_clients(pool, 6)
        assert 1 <= len(seen) <= 6
        assert until(lambda: len(pool.pids()) <= 2) and len(pool.pids()) >= 1
        assert until(lambda: not any(map(is_running, seen - set(pool.pids()))))
        load_image(encoded("PNG"), 28, ISOLATED)

    @pytest.mark.parametrize(("cores", "workers"), [(1, 2), (3, 3), (64, 8)])
    def test_there_are_no_more_than_cores(
        self, cores: int, workers: int, pool_for: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More would take time from the model when there is least of it."""
        pool = pool_for(cores)
        monkeypatch.setattr(pool_module, "_QUICK_S", 30.0)
        assert 1 <= len(seen_by_clients(pool, 12)) <= workers

    def test_those_started_ahead_are_all_that_a_burst_gets_and_stay(
        self, pool_for: Callable[[int], Pool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = pool_for(3)
        monkeypatch.setattr(pool_module, "_IDLE_S", 0.2)
        monkeypatch.setattr(pool_module, "_QUICK_S", 30.0)
        pool.start_ahead()
        before = pool.pids()
        assert len(before) == 3
        assert seen_by_clients(pool, 12) == set(before)
        time.sleep(0.5)
        pool.start_ahead()
        assert pool.pids() == before

    def test_none_can_be_started_ahead(
        self, pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A server answers texts all the same."""
        monkeypatch.setattr(pool_module, "_pool", pool)
        for program in ("/no/python", "/bin/false"):
            monkeypatch.setattr(process, "_python", lambda program=program: program)
            pool_module.start_ahead()
        monkeypatch.undo()
        assert len(caplog.messages) == 2 and all("turn isolate_images off" in text for text in caplog.messages)
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53

    def test_one_that_gets_no_processor_is_not_slow(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a busy machine a slow one would be ended, and another started, for each image."""
        load_image(encoded("PNG"), 28, ISOLATED)
        before = pool.pids()
        os.kill(before[0], signal.SIGSTOP)
        threading.Timer(0.6, os.kill, (before[0], signal.SIGCONT)).start()  # an image is slow after 0.04 s of its own
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53
        load_image(encoded("PNG"), 28, ISOLATED)
        assert pool.pids() == before

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_one_that_dies_fails_its_image_alone(self, pool: Pool, number: signal.Signals) -> None:
        load_image(encoded("PNG"), 28, ISOLATED)
        (pid,) = pool.pids()
        threading.Timer(0.3, os.kill, (pid, number)).start()
        message = f"the process that decodes it was ended by {number.name}; shrink it or save it in another format"
        with pytest.raises(ImageError, match=message):
            load_image(SLOW_JPEG, 28, ISOLATED)
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53
        assert pid not in pool.pids()

    def test_one_that_died_while_it_waited_is_replaced(self, pool: Pool) -> None:
        load_image(encoded("PNG"), 28, ISOLATED)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: not is_running(pid))
        assert load_image(encoded("PNG"), 28, ISOLATED).width == 53

    def test_cancellation_ends_the_process_at_once(self, pool: Pool) -> None:
        cancellation, outcome = Cancellation(), list[BaseException]()
        load_image(encoded("PNG"), 28, ISOLATED)
        (pid,) = pool.pids()

        def read() -> None:
            try:
                ImageReader(28, ISOLATED, cancellation).read(SLOW_JPEG)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.2)
        cancellation.cancel()
        thread.join(2)
        assert isinstance(outcome[0], Canceled) and not is_running(pid)
        with pytest.raises(Canceled):
            ImageReader(28, ISOLATED, cancellation).read(encoded("PNG"))

    def test_slow_images_do_not_hold_up_others(self, pool: Pool) -> None:
        limits = ImageLimits(isolate_images=True, image_timeout_s=3)
        load_image(encoded("PNG"), 28, ISOLATED)

        def read() -> None:
            with pytest.raises(ImageError, match=r"was not read within 3 s|was ended by SIGKILL"):
                load_image(SLOW_JPEG, 28, limits)

        threads = [threading.Thread(target=read) for _ in range(3)]  # one more than the slow lane holds
        for thread in threads:
            thread.start()
        took = []
        for _ in range(10):
            time.sleep(0.1)
            began = time.monotonic()
            load_image(encoded("PNG"), 28, ISOLATED)
            took.append(time.monotonic() - began)
        assert sorted(took)[5] < 0.5, "they take 3 s and more"
        pool.close()
        for thread in threads:
            thread.join()

    def test_none_can_be_started(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "_python", lambda: "/no/python")
        with pytest.raises(ImageError, match=r"no process for decoding images can be started .*: turn isolate"):
            load_image(encoded("PNG"), 28, ISOLATED)
        monkeypatch.setattr(process, "_python", lambda: "/bin/false")
        with pytest.raises(ImageError, match="the process that decodes images ended with code 1 as it started: "):
            load_image(encoded("PNG"), 28, ISOLATED)
        monkeypatch.undo()

    def test_needs_a_system_with_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "CAN_ISOLATE", False)
        with pytest.raises(ConfigError, match="isolate_images is True, which needs a POSIX system"):
            ImageLimits(isolate_images=True)

    def test_they_inherit_no_secrets(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_KEY", "hunter2")
        load_image(encoded("PNG"), 28, ISOLATED)
        environment = Path(f"/proc/{pool.pids()[0]}/environ")
        if not environment.exists():
            pytest.skip("needs /proc")
        assert b"hunter2" not in environment.read_bytes()

    def test_they_import_little(self) -> None:
        heavy = ("torch", "numpy", "tiktoken", "ssl", "urllib.request", "multiprocessing", "qvl_kernels")
        code = "import sys; from qvl_runtime.prompt.isolation import worker; import PIL.Image; "
        code += f"print([name for name in {heavy!r} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


SCRIPT = """
import io, os, sys, threading, time
from benchmarks.serving.hostile_images import progressive_jpeg, png
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.isolation.pool import shared_pool
from qvl_runtime.prompt.limits import ImageLimits
LIMITS = ImageLimits(isolate_images=True, image_timeout_s=1.5)
print(load_image(png(9, 9), 28, LIMITS).width, flush=True)  # no `if __name__ == "__main__"`: run once all the same
"""


class TestParents:
    def run(self, tmp_path: Path, code: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT + code)
        return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def test_a_script_without_a_guard_runs_once(self, tmp_path: Path) -> None:
        out, err = self.run(tmp_path, "print(*shared_pool().pids())").communicate(timeout=60)
        width, pid = out.split()
        assert width == "9" and err == "" and not is_running(int(pid)), "workers end with their parent"

    @pytest.mark.parametrize("busy", [False, True])
    def test_a_parent_that_is_killed(self, tmp_path: Path, busy: bool) -> None:
        code = "print(*shared_pool().pids(), flush=True)\n"
        if busy:
            code += "load_image(progressive_jpeg(1000, 20_000), 28, LIMITS)"
        else:  # a child that holds the parent's end of the connection
            code += "child = os.fork()\nif child:\n    print(child, flush=True)\ntime.sleep(60)"
        with self.run(tmp_path, code) as parent:
            assert parent.stdout is not None
            pid = int([parent.stdout.readline() for _ in range(2)][1])
            child = 0 if busy else int(parent.stdout.readline())
            time.sleep(0.3)
            parent.kill()
            parent.wait()
            gone = until(lambda: not is_running(pid), 8)
            if child:
                os.kill(child, signal.SIGKILL)
            assert gone

    def test_a_forked_child_has_workers_of_its_own(self, tmp_path: Path) -> None:
        code = """
before = shared_pool().pids()
child = os.fork()
load_image(png(9, 9), 28, LIMITS)
after = shared_pool().pids()
if child == 0:
    os._exit(0 if len(after) == 1 and after != before else 1)
print(os.waitpid(child, 0)[1], after == before)
"""
        out, err = self.run(tmp_path, code).communicate(timeout=60)
        assert (out.split(), err) == (["9", "0", "True"], "")

    def test_exit_while_one_works_is_clean(self, tmp_path: Path) -> None:
        code = """
read = lambda: load_image(progressive_jpeg(1000, 20_000), 28, LIMITS)
threading.Thread(target=read, daemon=True).start()
time.sleep(0.5)
print(*shared_pool().pids())
"""
        done = self.run(tmp_path, code)
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0 and "Warning" not in err
        assert not any(is_running(int(pid)) for pid in out.split()[1:])
