"""The options of the server, validated when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qvl_runtime.config.checks import require_positive
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.prompt.hosts import canonical

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the server accepts, and how much of it. Raises `ConfigError` for a value out of range."""

    model_names: tuple[str, ...] = ("nano",)  # ids of the model; answers carry the first
    adapters: tuple[str, ...] = ()  # of the engine, each a model's id, too
    any_model: bool = False  # answer whatever model a request names
    max_waiting: int = 192  # requests beyond those that run together; more get 429
    max_body_bytes: int | None = None  # None: what the images of a request take in base64, and 1 MiB
    body_timeout_s: float = 30.0  # for a body to arrive
    max_answer_tokens: int | None = None  # an answer's limit, whatever is asked for
    max_answers: int = 16  # n
    max_prompts: int = 256  # of one /v1/completions request
    request_timeout_s: float | None = None  # an answer that takes longer ends with what it has
    drain_s: float = 30.0  # for running requests, once the server is told to end
    cors_origins: tuple[str, ...] = ()  # web pages of other origins that may use the API; "*": any
    hosts: tuple[str, ...] | None = None  # names that it answers to, against DNS rebinding; None: any
    metrics: bool = True  # whether there is /metrics
    page: bool = True  # whether there is a page at /
    exit_on_failure: bool = False  # end the process if the thread of the model ends

    def __post_init__(self) -> None:
        require_positive(self, "", "max_answers", "max_prompts")
        for name in ("max_body_bytes", "max_answer_tokens"):
            if getattr(self, name) is not None:
                require_positive(self, "", name)
        for name in ("body_timeout_s", "drain_s", "request_timeout_s"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; expected a positive number of seconds")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting is {self.max_waiting}; expected 0 or more")
        if not self.model_names or not all(name and name.isprintable() for name in self.model_names):
            raise ConfigError(f"model_names is {quoted(self.model_names)}; expected at least one printable name")
        if twice := set(self.adapters) & set(self.model_names):
            raise ConfigError(f"{quoted(min(twice))} is the name of the model and of an adapter: rename one of them")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"cors_origins has {quoted(origin)}; expected https://example.com, or * for any")
        for host in self.hosts or ():
            if not canonical(host):
                raise ConfigError(f"hosts has {quoted(host)}; expected a host name, without a port")

    @property
    def served(self) -> tuple[str, ...]:
        """Every id that a request may name: those of the model, then the adapters."""
        return (*self.model_names, *self.adapters)


def is_loopback(host: str) -> bool:
    """Whether a server that listens at `host` is reached from this machine only."""
    return canonical(host) in LOOPBACK or canonical(host).startswith("127.")
