"""A connection to a Ray cluster, with errors of one line that say what is missing."""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Any

from qvl_runtime.errors import ClusterError, quoted

LOCAL = "local"
_CONNECT_S = 5.0


def import_ray() -> Any:
    """Ray, with its usage reports off unless the user chose. Raises `ClusterError` if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError(f"{error.name} is not installed: pip install 'qvl-runtime[ray]'") from None
    return ray


def connect(address: str, cpus: int | None = None) -> Any:
    """Connect to a cluster, and return ray.

    address: host:port of its head, ray://host:port of a client's server, "auto" for the one on this machine, or "local"
    for one that is made here and ends with this process. cpus: of the latter. Raises `ClusterError`.
    """
    ray = import_ray()
    _check_listens(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": cpus, "include_dashboard": False}
        _as_a_minimal_install()
    try:
        ray.init(address=address, **options)
    except Exception as error:  # of many kinds: ConnectionError, RuntimeError, ValueError, grpc's
        raise ClusterError(_why(address, error)) from error
    return ray


def _as_a_minimal_install() -> None:
    """Have a cluster that is made here start without Ray's dashboard and metrics, as without its extra `default`.

    Each of its processes would import what those need before it listens, while the next one waits for it.
    """
    sys.modules.setdefault("ray.dashboard.optional_deps", None)  # type: ignore[arg-type]  # an import fails then


def disconnect() -> None:
    """End the connection, and the cluster if it was made here: at the interpreter's end Ray would sleep first."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def first_line(error: BaseException) -> str:
    """The first line of a message: Ray's go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require(ray: Any, kind: str, amount: float) -> None:
    """Raise `ClusterError` unless some node has as much of a resource, in use or not."""
    most = max((node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]), default=0)
    if most < amount:
        has = f"at most {most:g}" if most else "none"
        raise ClusterError(f"an actor needs {amount:g} {kind}, and no node of the cluster has that ({has})")


def _check_listens(address: str) -> None:
    """Raise `ClusterError` if there is nothing at host:port: Ray would try again for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        if address not in (LOCAL, "auto"):
            raise ClusterError(f"the address {quoted(address)} is none; expected host:port, auto or {LOCAL}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(_nothing(address)) from error


def _nothing(address: str) -> str:
    return (
        f"there is no Ray cluster at {quoted(address)}: start one with `ray start --head`, "
        f"or give --ray {LOCAL} for this machine alone"
    )


def _why(address: str, error: Exception) -> str:
    text, causes = str(error), [error.__cause__, error.__context__]
    if "InvalidAuthToken" in text or any(cause is not None and "InvalidAuthToken" in str(cause) for cause in causes):
        return (
            f"the Ray cluster at {quoted(address)} asks for a token: set RAY_AUTH_MODE=token, and have the cluster's "
            "in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if "ersion mismatch" in text or ("versions" in text.lower() and "match" in text.lower()):
        said = " ".join(text.split())
        return f"the cluster at {address} runs other versions of Ray or Python; install the same here: {said}"
    if isinstance(error, (ConnectionError, TimeoutError)) or "connect" in text.lower():
        return _nothing(address)
    return f"no connection to the Ray cluster at {quoted(address)}: {first_line(error)}"
