"""Prometheus metrics, under vLLM's names with the prefix `qvl_`, so that its dashboards need little change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

_FAST = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
_LENGTHS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """Counts what becomes of requests, and reads the state of an engine when it is asked for."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._images = self._counter("image_tokens", "Tokens of prompts that are images.")
        reasons = ("model_name", "finished_reason")
        self._success = Counter("qvl_request_success", "Answers by what ended them.", reasons, registry=self.registry)
        self._http = Counter(
            "qvl_http_requests", "HTTP requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FAST)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _FAST)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SLOW)
        self._queue = self._histogram("request_queue_time_seconds", "Before the first step.", _FAST)
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt.", _FAST)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _SLOW)
        self._read = self._histogram("image_read_time_seconds", "Fetching and decoding images, tokenizing.", _FAST)
        self._encode = self._histogram("image_encode_time_seconds", "The vision encoder.", _FAST)
        self._n = self._histogram("request_params_n", "Answers asked for.", _COUNTS)
        self._max_tokens = self._histogram("request_params_max_tokens", "Longest answer asked for.", _LENGTHS)

    def watch(self, engine: Engine) -> None:
        """Include the state of an engine."""
        self.registry.register(_EngineState(engine, self._model))

    def finished(self, answers: Sequence[Completion]) -> None:
        """Count the answers to one prompt."""
        usage, timings = answers[0].usage, answers[0].timings
        self._prompt.inc(usage.prompt_tokens)
        self._images.inc(usage.image_tokens)
        for answer in answers:
            self._generated.inc(answer.usage.completion_tokens)
            self._success.labels(self._model, answer.finish_reason).inc()
            self._decode.observe(answer.timings.decode_s)
            if answer.timings.decoded_tokens:
                self._inter_token.observe(answer.timings.decode_s / answer.timings.decoded_tokens)
        self._ttft.observe(timings.ttft_s)
        self._e2e.observe(timings.ttft_s + max(answer.timings.decode_s for answer in answers))
        self._queue.observe(timings.queue_s)
        self._prefill.observe(timings.prefill_s)
        if usage.images:
            self._read.observe(timings.image_s)
            self._encode.observe(timings.vision_s)

    def asked(self, params: SamplingParams) -> None:
        """Count what a request asks for."""
        self._n.observe(params.n)
        self._max_tokens.observe(params.max_tokens or 0)

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP request; route: one of a few, never a path that a client chose."""
        self._http.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, does: str) -> Counter:
        return Counter(f"qvl_{name}", does, ("model_name",), registry=self.registry).labels(self._model)

    def _histogram(self, name: str, does: str, buckets: Sequence[float]) -> Histogram:
        found = Histogram(f"qvl_{name}", does, ("model_name",), registry=self.registry, buckets=buckets)
        return found.labels(self._model)


class _EngineState(Collector):
    """Numbers that the engine keeps anyway. They are read without waiting for its step, each by itself."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        """Read them."""
        core = self._engine.core
        cache, images = core.runner.cache, core.runner.images
        pool = cache.pool
        yield self._gauge("num_requests_running", "Answers that are computed together.", len(core.scheduler.running))
        yield self._gauge("num_requests_waiting", "Answers that wait for a place.", len(core.scheduler.waiting))
        used = 1 - pool.available / pool.num_blocks
        yield self._gauge("kv_cache_usage_perc", "Part of the KV cache that requests hold, 0 to 1.", used)
        if (prefixes := cache.prefixes) is not None:
            queried, hit = prefixes.queried_tokens, prefixes.hit_tokens
            yield self._count("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queried)
            yield self._count("prefix_cache_hits", "Prompt tokens found there.", hit)
        lookups = images.hits + images.misses
        yield self._count("mm_cache_queries", "Images looked up in the cache of encoded images.", lookups)
        yield self._count("mm_cache_hits", "Images found there.", images.hits)
        yield self._count("num_preemptions", "Answers that lost their blocks to others.", core.scheduler.preemptions)
        yield self._count("engine_steps", "Steps of the model.", core.steps)

    def _gauge(self, name: str, does: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"qvl_{name}", does, labels=("model_name",))
        family.add_metric([self._model], value)
        return family

    def _count(self, name: str, does: str, value: float) -> Metric:
        family = CounterMetricFamily(f"qvl_{name}", does, labels=("model_name",))
        family.add_metric([self._model], value)
        return family
