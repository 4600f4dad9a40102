"""From loading to draining: what each state answers, and how the process ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from qvl_runtime import Engine
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.prompt.isolation import pool as pool_module
from qvl_runtime.prompt.isolation.pool import Pool
from qvl_runtime.prompt.limits import CAN_ISOLATE
from qvl_runtime.server.config import ServerConfig
from tests.fakes import qvl
from tests.server.conftest import Live, data_url, png, say, serving

pytestmark = pytest.mark.cpu
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
ENDLESS = ASK | {"max_tokens": 1800, "ignore_eos": True}


def in_thread(function: Any) -> queue.SimpleQueue[Any]:
    """Run a function in a thread, and return a queue that gets its result."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=lambda: found.put(function()), daemon=True).start()
    return found


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_it_answers_while_the_model_loads(nano: Engine) -> None:
    """SERVING 1e: health checks do not wait for the model; requests get 503 and when to try again."""
    loaded = threading.Event()

    def load() -> Engine:
        loaded.wait(20)
        return nano

    with serving(load, ready=False) as live:
        assert live.get("/health/live").json() == {"status": "loading"}
        assert live.get("/health/ready").status == 503
        refused = live.post(CHAT, ASK)
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "loading"
        assert live.get("/v1/models").json()["data"][0]["id"] == "nano"
        loaded.set()
        wait(lambda: live.get("/health/ready").status == 200)
        assert live.post(CHAT, ASK).status == 200


@pytest.mark.skipif(not CAN_ISOLATE, reason="needs a POSIX system")
def test_decoders_are_started_before_requests_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first burst of pictures would start them, when the machine is busiest."""
    pool = Pool()
    monkeypatch.setattr(pool_module, "_pool", pool)
    monkeypatch.setattr(pool_module, "_QUICK_S", 30.0)  # none is slow, however busy the machine is
    body = ASK | {"messages": say("hi", data_url(png()))}
    with serving(Engine) as live:
        before = pool.pids()
        answers = [in_thread(lambda: live.post(CHAT, body)) for _ in range(12)]
        assert all(answer.get(timeout=60).status == 200 for answer in answers)
        assert len(before) >= 2 and pool.pids() == before
    pool.close()


def test_draining(nano: Engine) -> None:
    """1d: ready is 503, new requests get 503 with Retry-After, running ones finish, then it ends."""
    with serving(lambda: nano, drain_s=30) as live:
        body = ASK | {"max_tokens": 250, "ignore_eos": True}
        running = in_thread(lambda: live.post(CHAT, body))
        wait(lambda: live.engine.core.scheduler.running)
        assert live.server._loop is not None
        live.server._loop.call_soon_threadsafe(live.server.drain)
        wait(lambda: live.service.draining)
        assert live.get("/health/ready").status == 503 and live.get("/health/live").status == 200
        refused = live.post(CHAT, ASK)
        assert (
            refused.status == 503 and refused.json()["error"]["code"] == "draining" and refused.headers["retry-after"]
        )
        answer = running.get(timeout=30)
        assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] == 250
        wait(lambda: live.server.should_exit)


def test_what_runs_longer_than_the_drain_is_cut_off(nano: Engine) -> None:
    with serving(lambda: nano, drain_s=0.2) as live:
        running = in_thread(lambda: live.post(CHAT, ENDLESS))
        wait(lambda: nano.core.scheduler.running)
        assert live.server._loop is not None
        live.server._loop.call_soon_threadsafe(live.server.drain)
        wait(lambda: live.server.should_exit)
    cut = running.get(timeout=10)
    assert cut.status == 500 and cut.json()["error"]["code"] == "engine_dead" and not nano.core.scheduler.running


def test_a_full_queue_is_429(nano: Engine) -> None:
    """1d: Retry-After, the client's RateLimitError; all others are answered, none is lost."""
    with serving(lambda: nano, max_waiting=0) as live:
        limit = live.service.max_active
        running = [
            in_thread(lambda: live.post(CHAT, ASK | {"max_tokens": 60, "ignore_eos": True})) for _ in range(limit)
        ]
        wait(lambda: live.service.active == limit)
        refused = live.post(CHAT, ASK)
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            live.openai().chat.completions.create(model="nano", messages=say("hi"))
        assert live.get("/health/ready").status == 200
        assert all(found.get(timeout=60).status == 200 for found in running)
        assert live.post(CHAT, ASK).status == 200


def test_an_engine_failure(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """1b, 3 (test_chat_error): 500 when whole; in a stream an error event, then [DONE]; the next is answered."""
    monkeypatch.setattr(live.engine.core.runner, "compute", lambda chunks: 1 / 0)
    whole = live.post(CHAT, ASK)
    assert whole.status == 500 and whole.json()["error"]["type"] == "server_error"
    assert live.post(CHAT, ASK | {"stream": True}).status == 500  # nothing was sent yet
    monkeypatch.undo()
    real, calls = live.engine.core.runner.compute, 0

    def fail_later(chunks: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(chunks) if calls < 4 else 1 / 0

    monkeypatch.setattr(live.engine.core.runner, "compute", fail_later)
    streamed = live.post(CHAT, ENDLESS | {"stream": True})
    monkeypatch.undo()
    *_, error, done, rest = streamed.body.decode().split("\n\n")
    assert streamed.status == 200 and done == "data: [DONE]" and not rest
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert live.post(CHAT, ASK).status == 200


def test_a_thread_of_the_model_that_ends(nano: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """1d: 500 once, ready is 503 from then on, and the process ends if it was asked to."""
    with serving(lambda: nano, exit_on_failure=True) as live:
        monkeypatch.setattr(nano, "exclusive", lambda: 1 / 0)
        assert live.post(CHAT, ASK).status == 500
        wait(lambda: live.service.is_over)  # the thread may meet the fault again after it has told the request
        monkeypatch.undo()
        live.thread.join(10)
        assert live.service.state == "failed" and not live.thread.is_alive()
    with serving(lambda: nano) as live:
        monkeypatch.setattr(nano, "exclusive", lambda: 1 / 0)
        assert live.post(CHAT, ASK).status == 500
        wait(lambda: live.service.state == "failed")
        monkeypatch.undo()
        assert live.get("/health/ready").status == 503 and live.post(CHAT, ASK).json()["error"]["code"] == "engine_dead"
        assert not live.server.should_exit


def test_a_checkpoint_that_cannot_be_loaded() -> None:
    def load() -> Engine:
        raise CheckpointError("broken")

    with serving(load, ready=False) as live:
        wait(lambda: live.service.is_over)
        live.thread.join(10)
        assert live.service.state == "failed" and not live.thread.is_alive() and str(live.service.failure) == "broken"


def test_metrics(live: Live) -> None:
    """1b, 3 (test_metrics): vLLM's names; after an abort, running, waiting and cache usage are 0 again."""

    def read() -> dict[str, float]:
        lines = live.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = read()
    answer = live.post(CHAT, ASK | {"max_tokens": 7, "ignore_eos": True}).json()
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        data = json.dumps(ENDLESS).encode()
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        wait(lambda: live.engine.core.scheduler.running)
        assert read()['qvl_num_requests_running{model_name="nano"}'] == 1
        assert read()['qvl_kv_cache_usage_perc{model_name="nano"}'] > 0
    live.wait_free()
    after = read()
    label = '{model_name="nano"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"qvl_{name}{label}"] == 0
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[f"qvl_generation_tokens_total{label}"] == 7
    assert grown[f"qvl_prompt_tokens_total{label}"] == answer["usage"]["prompt_tokens"]
    assert grown['qvl_request_success_total{finished_reason="length",model_name="nano"}'] == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown[f"qvl_{name}_count{label}"] == 1
    assert grown[f'qvl_http_requests_total{{route="{CHAT}",status="200"}}'] == 1
    assert f"qvl_prefix_cache_queries_total{label}" in after and f"qvl_mm_cache_hits_total{label}" in after


def start(*options: str, until: bytes = b"ready") -> tuple[subprocess.Popen[bytes], int]:
    """`qvl serve` in a process of its own, and its port, once it has printed a line that begins so."""
    code = "from qvl_runtime.cli.app import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(until):
            break
    return process, port


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_the_command_ends_by_its_signals(tmp_path: Path) -> None:
    """SIGTERM lets a running answer finish and exits with 0; Ctrl-C exits with 130; a port in use with 2."""
    process, port = start("--max-model-len", "1024", "--served-model-name", "mine")
    url = f"http://127.0.0.1:{port}/v1"
    client: Any = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="mine", messages=say("hi"), stream=True, max_tokens=200, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    process.send_signal(signal.SIGTERM)
    *_, last = list(chunks)
    assert last.choices[0].finish_reason == "length"
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    (line,) = [json.loads(line) for line in output.decode().splitlines()]
    assert line["path"] == CHAT and line["completion_tokens"] == 200


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("signals", [1, 2], ids=["while it loads", "twice"])
def test_ctrl_c_says_nothing_more(signals: int) -> None:
    """An interruption is no error, so it shows no traceback; the second ends what still runs."""
    process, port = start(until=b"listening" if signals == 1 else b"ready")
    if signals == 2:
        client: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        options = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        next(iter(client.chat.completions.create(model="nano", messages=say("hi"), stream=True, **options)))
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors, errors.decode()


def test_options_that_contradict() -> None:
    for options, problem in (
        ({"max_waiting": -1}, "max_waiting"),
        ({"drain_s": 0}, "drain_s"),
        ({"cors_origins": ("example.com",)}, "cors_origins"),
        ({"hosts": ("a b",)}, "hosts"),
        ({"model_names": ()}, "model_names"),
    ):
        with pytest.raises(ConfigError, match=problem):
            ServerConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999999"], "--port is 99999999; expected 0 to 65535"),
        (["--port", "-1"], "--port is -1; expected 0 to 65535"),
        (["--host", "0.0.0.0"], "can be reached from other machines: give keys by --api-key-file"),
        (["--adapter", "mine"], "adapter is 'mine'; expected NAME=DIR"),
        (["some", "--model", "other"], "the model is given twice"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(options: list[str], words: str) -> None:
    result = qvl("serve", *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and words in " ".join(result.stderr.split()), result.stderr
