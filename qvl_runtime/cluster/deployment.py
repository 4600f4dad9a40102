"""`qvl serve` as an application of Ray Serve: replicas of the server behind a gateway."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qvl_runtime.cluster.affinity import DEFAULT_BOUND
from qvl_runtime.cluster.connect import require
from qvl_runtime.cluster.gateway import Gateway
from qvl_runtime.cluster.replica import Replica, server_config
from qvl_runtime.errors import ClusterError

NAME = "qvl"
IMPORT_PATH = "qvl_runtime.cluster.deployment:build"
_ROUTER = "qvl_runtime.cluster.router.AffinityRouter"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_UNUSED_SLACK = 16  # requests that a replica may have beyond those that its server takes, and refuses with 429


@dataclass(frozen=True)
class Deployment:
    """What the application is made of; in JSON, since it stands in Serve's config file."""

    engine: dict[str, Any] = field(default_factory=dict)  # arguments of `Engine`
    server: dict[str, Any] = field(default_factory=dict)  # arguments of `ServerConfig`
    keys: str | None = None  # file of API keys, on every node
    replicas: int = 1
    gpus: float = 0  # of each replica
    cpus: float = 1
    threads: int | None = None  # of each replica; None: as torch has them
    bound: float = DEFAULT_BOUND  # of a replica's requests, against the mean
    access_log: bool = True


def build(args: Mapping[str, Any]) -> Any:
    """The application, from the fields of `Deployment`: what `import_path` of a config file names."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from qvl_runtime.config.engine import EngineConfig
    from qvl_runtime.server.endpoint import body_limit

    wanted = Deployment(**args)
    config = server_config(wanted.server)
    known = {entry.name for entry in fields(EngineConfig)}
    engine = EngineConfig(**{name: value for name, value in wanted.engine.items() if name in known})
    most = engine.max_running + config.max_waiting + _UNUSED_SLACK
    replicas = serve.deployment(
        Replica,
        name="model",
        num_replicas=wanted.replicas,
        max_ongoing_requests=most,
        ray_actor_options={"num_gpus": wanted.gpus, "num_cpus": wanted.cpus},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.drain_s,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"bound": wanted.bound}
        ),
    ).bind(wanted.engine, wanted.server, wanted.keys, wanted.threads, wanted.access_log)

    @serve.ingress()
    class Ingress:
        """Where Serve's proxies bring requests."""

        def __init__(self, replicas: Any, limit: int, timeout_s: float) -> None:
            self._gateway = Gateway(replicas, limit, timeout_s)

        def __serve_build_asgi_app__(self) -> Gateway:
            return self._gateway

    gateway = serve.deployment(Ingress, name="gateway", max_ongoing_requests=wanted.replicas * most)
    limit = body_limit(config, engine.image_limits)
    return gateway.options(ray_actor_options={"num_cpus": 0}).bind(replicas, limit, config.body_timeout_s)


@contextmanager
def run(ray: Any, deployment: Deployment, host: str, port: int, wait_s: float, over: threading.Event) -> Iterator[None]:
    """Deploy the application for the time of the body; an older one of the same name is updated, replica by replica.

    The body begins once a replica is ready, or `over` is set. Raises `ClusterError` if none is within `wait_s`.
    """
    from ray import serve

    require(ray, "GPU" if deployment.gpus else "CPU", deployment.gpus or deployment.cpus)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port}, logging_config=_QUIET)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise ClusterError(f"Ray Serve cannot listen at {host}:{port}: {last}; choose another --port") from error
    try:
        application = build(asdict(deployment))
        options = {"name": NAME, "route_prefix": "/", "logging_config": _QUIET}
        deploy = threading.Thread(target=serve.run, args=(application,), kwargs=options, daemon=True)
        deploy.start()  # it waits for all replicas, without an end
        began = time.monotonic()
        while not over.wait(0.2):
            application = serve.status().applications[NAME]
            if application.status == "RUNNING":
                break
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ClusterError(
                    f"the application cannot be deployed: {' '.join(application.message.split())[-300:]}"
                )
            if time.monotonic() - began > wait_s:
                raise ClusterError(f"no engine was ready within {wait_s:g} s; see `ray status` for what others use")
        yield
    finally:
        serve.delete(NAME)


def config_file(deployment: Deployment, host: str, port: int) -> str:
    """The file for `serve deploy`, in YAML. Raises `ModuleNotFoundError` without PyYAML, which Ray brings."""
    import yaml

    application = {"name": NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": asdict(deployment)}
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [application],
    }
    return str(yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """The same with lists for tuples and strings for paths."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
