"""`qvl serve` on Ray Serve: the tests of OpenAI's client as they are; pictures stay, clients and replicas go."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import openai
import pytest
import torch

from qvl_runtime import Engine
from tests.server.conftest import Live, data_url, demo, demo_url, nano, png, say
from tests.server.test_chat import (
    test_a_stream,
    test_an_answer_has_its_boxes_as_data,
    test_async_and_several_at_once,
    test_boxes_can_be_forced,
    test_json_answers,
    test_logprobs_join_to_the_text,
    test_models,
    test_n_and_seed,
    test_structured_outputs,
)
from tests.server.test_completions import (
    test_echo_scores_prompts_as_lm_eval_asks,
    test_images_in_raw_prompts,
    test_lists_of_prompts_streamed_and_whole,
    test_max_tokens_0_scores_alone,
    test_the_token_that_ends_an_answer_is_counted,
    test_tokenize_and_back,
)

pytest.importorskip("ray", reason="Ray is not installed: make ray")
pytestmark = [pytest.mark.cpu, pytest.mark.timeout(900)]
# Found by pytest in this module: fixtures, and tests that this file's `live` turns to Ray.
__all__ = ["demo", "demo_url", "nano"]
SUITE = (
    test_json_answers,
    test_models,
    test_a_stream,
    test_an_answer_has_its_boxes_as_data,
    test_async_and_several_at_once,
    test_boxes_can_be_forced,
    test_json_answers,
    test_logprobs_join_to_the_text,
    test_n_and_seed,
    test_structured_outputs,
    test_echo_scores_prompts_as_lm_eval_asks,
    test_images_in_raw_prompts,
    test_lists_of_prompts_streamed_and_whole,
    test_max_tokens_0_scores_alone,
    test_the_token_that_ends_an_answer_is_counted,
    test_tokenize_and_back,
)


class Remote(Live):
    """A server on Ray, with an engine here to compare with."""

    def __init__(self, port: int, engine: Engine, handle: Any, deployment: Any) -> None:
        self.port, self.url, self.local, self.handle = port, f"http://127.0.0.1:{port}", engine, handle
        self.deployment = deployment

    @property
    def engine(self) -> Engine:
        return self.local

    def replicas(self) -> dict[int, dict[str, Any]]:
        """What each replica says of itself, by its process."""
        found = {}
        for number in range(12):  # keys of which some are each replica's
            said = self.handle.process.remote(str(number)).result(timeout_s=60)
            found[said["pid"]] = said
        return found


@pytest.fixture(scope="module")
def remote(nano: Engine) -> Iterator[Remote]:
    from ray import serve

    from qvl_runtime.cluster.connect import connect
    from qvl_runtime.cluster.deployment import NAME, Deployment, run

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    ray = connect("local", cpus=3)
    engine = {"dtype": "float32", "max_model_len": 2048, "allow_files": False, "allow_urls": False}
    deployment = Deployment(
        engine, {"model_names": ["nano", "another-name"]}, replicas=2, threads=torch.get_num_threads()
    )
    with run(ray, deployment, "127.0.0.1", port, 300, threading.Event()):
        yield Remote(port, nano, serve.get_deployment_handle("model", NAME), deployment)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def live(remote: Remote) -> Remote:
    return remote


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_picture_is_encoded_by_one_replica(remote: Remote) -> None:
    before = remote.replicas()
    assert len(before) == 2
    for question in ("What is this?", "Which color?", "Box it"):
        for green in range(8):
            messages = say(question, data_url(png(f"#12{20 * green:02x}77")))
            remote.openai().chat.completions.create(model="nano", messages=messages, max_tokens=2)
    encoded = {pid: said["misses"] - before[pid]["misses"] for pid, said in remote.replicas().items()}
    assert sum(encoded.values()) == 8 and min(encoded.values()) >= 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_request(remote: Remote, stream: bool) -> None:
    request = {"messages": say("Tell me all"), "ignore_eos": True, "max_tokens": 1900, "stream": stream, "n": 4}
    body = json.dumps(request).encode()
    sock = socket.create_connection(("127.0.0.1", remote.port), timeout=30)
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    until(lambda: any(said["active"] for said in remote.replicas().values()))
    sock.close()
    until(lambda: not any(said["active"] for said in remote.replicas().values()), 5)


def test_a_body_over_the_limit_is_refused_by_the_gateway(remote: Remote) -> None:
    answer = remote.ask("POST", "/v1/chat/completions", b"{}", {"Content-Length": str(10**10)})
    assert answer.status == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_killed_replica_loses_what_it_held_and_says_so_and_is_replaced(remote: Remote) -> None:
    outcomes: list[str] = []

    def ask(seed: int) -> None:
        try:
            remote.openai().chat.completions.create(
                model="nano", messages=say("Tell me"), max_tokens=300, seed=seed, extra_body={"ignore_eos": True}
            )
            outcomes.append("answered")
        except openai.APIStatusError as error:
            outcomes.append(str(error.code))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    until(lambda: sum(said["active"] for said in remote.replicas().values()) >= 8)
    pid, held = max(((pid, said["active"]) for pid, said in remote.replicas().items()), key=lambda pair: pair[1])
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(outcomes) == 16 and set(outcomes) <= {"answered", "replica_lost"}
    assert 1 <= outcomes.count("replica_lost") <= held + 4  # and those that came between the count and the kill
    until(lambda: len(set(remote.replicas()) - {pid}) == 2, 120)


def test_a_changed_deployment_replaces_replicas_without_a_failed_request(remote: Remote) -> None:
    from ray import serve

    from qvl_runtime.cluster.deployment import NAME, build

    before, over, outcomes = set(remote.replicas()), threading.Event(), list[int]()

    def ask(number: int) -> None:
        turn = 0
        while not over.is_set():
            body = {"messages": say(f"{number} {turn}"), "max_tokens": 20, "ignore_eos": True}
            outcomes.append(remote.ask("POST", "/v1/chat/completions", json.dumps(body).encode()).status)
            turn += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        changed = replace(remote.deployment, engine=remote.deployment.engine | {"max_model_len": 1024})
        serve.run(build(asdict(changed)), name=NAME, route_prefix="/")
        until(lambda: len(found := set(remote.replicas())) == 2 and not found & before, 120)
        time.sleep(0.5)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(outcomes) > 10 and set(outcomes) == {200}
