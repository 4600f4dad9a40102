"""What is said of a cluster that is not there, or is another."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from qvl_runtime.cluster import connect as module
from qvl_runtime.cluster.actor import ActorSpec, Versions, is_poisoned
from qvl_runtime.cluster.connect import connect, require
from qvl_runtime.cluster.pool import ActorPool
from qvl_runtime.errors import ClusterError, StepError
from qvl_runtime.schedule.api import SamplingParams

pytestmark = pytest.mark.unit


class Ray:
    """As much of Ray as is asked here."""

    def __init__(self, error: Exception | None = None, **resources: float) -> None:
        self.error = error
        self._nodes = [{"Alive": True, "Resources": resources}, {"Alive": False, "Resources": {"GPU": 8.0}}]

    def init(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, kind: type) -> Any:
        actor = SimpleNamespace(__ray_ready__=self, load=self)
        made = SimpleNamespace(remote=lambda spec: actor)
        self.remote = lambda *_: object()  # type: ignore[method-assign]
        return SimpleNamespace(options=lambda **_: made)

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [], refs


def refused_token() -> Exception:
    """Ray's, with its reason behind it."""
    error = ConnectionError("Failed to connect to Ray cluster")
    error.__cause__ = RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect")
    return error


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:1", None, "there is no Ray cluster at '127.0.0.1:1': start one with `ray start --head`"),
        ("ray://127.0.0.1:1", None, "there is no Ray cluster at 'ray://127.0.0.1:1'"),
        ("[::1]:99999", None, "there is no Ray cluster at"),
        ("somewhere", None, "the address 'somewhere' is none; expected host:port, auto or local"),
        ("auto", refused_token(), "the Ray cluster at 'auto' asks for a token: set RAY_AUTH_MODE=token"),
        ("auto", ConnectionError("Could not find any running Ray instance"), "there is no Ray cluster at 'auto'"),
        (
            "auto",
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.10.1"),
            "runs other versions of Ray or Python; install the same here: .*Ray: 2.50.0",
        ),
        ("auto", ValueError("first\nsecond"), "no connection to the Ray cluster at 'auto': first$"),
    ],
)
def test_a_cluster_that_cannot_be_used(
    address: str, error: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "import_ray", lambda: Ray(error))
    began = time.monotonic()
    with pytest.raises(ClusterError, match=message) as caught:
        connect(address)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 6


def test_what_no_node_has() -> None:
    require(Ray(CPU=4.0), "CPU", 4)
    with pytest.raises(ClusterError, match=r"needs 1 GPU, and no node of the cluster has that \(none\)"):
        require(Ray(CPU=4.0), "GPU", 1)
    with pytest.raises(ClusterError, match=r"needs 8 CPU, and no node of the cluster has that \(at most 4\)"):
        require(Ray(CPU=4.0), "CPU", 8)


def pool(ray: Ray, wait_s: float) -> ActorPool:
    return ActorPool(ray, ActorSpec({}, SamplingParams(), "in", 100, 1, "."), 1, 1, 1, wait_s)


def test_gpus_that_others_use_are_waited_for_and_then_named() -> None:
    with pytest.raises(ClusterError, match=r"no actor got its 1 GPU within 0.05 s: others use them"):
        pool(Ray(GPU=1.0), 0.05).events()


def test_an_actor_with_other_versions_or_without_the_model_is_refused() -> None:
    made = pool(Ray(GPU=1.0), 1)
    made._check(Versions.here())
    with pytest.raises(ClusterError, match=r"an actor has qvl 0\.0\.9, and this machine"):
        made._check(Versions.here()._replace(qvl="0.0.9"))
    with pytest.raises(ClusterError, match="an actor cannot load the model: no such folder"):
        made._check("no such folder")


def test_which_errors_end_a_process() -> None:
    error = StepError("a step failed")
    error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_poisoned(error)
    error.__cause__ = RuntimeError("CUDA out of memory")
    assert not is_poisoned(error) and not is_poisoned(StepError("another"))
