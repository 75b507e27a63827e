"""What Prometheus reads: one registry for each app; counts of the engine and of the store are read when it asks.

Labels never hold what a client wrote: routes are templates, prompts are those that the engine has loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from engine.api import Engine, EngineInfo, EngineStats
from engine.request import RequestDone
from prompts_store.records import StoreStats

PREFIX = "promptstitch:"
SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
OPERATION = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LOADED_PROMPTS_SHOWN = 64


class Metrics:
    """Counters and histograms that the server keeps by itself. Thread-safe, as prometheus_client is."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=self.registry)
        # Requests of any kind.
        self.http_requests = self._counter(
            "http_requests", "Requests answered.", ["method", "handler", "status"], prefix=""
        )
        self.http_duration = self._histogram(
            "http_request_duration_seconds",
            "Time to the last byte.",
            SECONDS,
            ["method", "handler"],
            prefix="",
        )
        self.auth_failures = self._counter("auth_failures", "Requests refused for their key.", ["reason"])
        # Inference.
        self.ttft = self._histogram("time_to_first_token_seconds", "Queue and prefill.", SECONDS, ["model_name"])
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Mean over a request's tokens.", BETWEEN_TOKENS, ["model_name"]
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Whole requests.", SECONDS, ["model_name"])
        self.queue_time = self._histogram("request_queue_time_seconds", "Waiting.", SECONDS, ["model_name"])
        self.prefill_time = self._histogram("request_prefill_time_seconds", "Prefill.", SECONDS, ["model_name"])
        self.decode_time = self._histogram("request_decode_time_seconds", "Decode.", SECONDS, ["model_name"])
        self.text_tokens = self._histogram("request_prompt_tokens", "Text tokens.", TOKENS, ["model_name"])
        self.soft_tokens = self._histogram("request_soft_tokens", "Soft tokens.", TOKENS, ["model_name"])
        self.generated = self._histogram("request_generation_tokens", "Generated tokens.", TOKENS, ["model_name"])
        self.success = self._counter("request_success", "Choices that ended well.", ["model_name", "finished_reason"])
        self.rejected = self._counter("requests_rejected", "Inference requests refused.", ["reason"])
        # The registry.
        self.uploads = self._counter("uploads", "Uploaded prompts.", ["result", "code"])
        self.upload_bytes = self._counter("upload_bytes", "Bytes of accepted uploads.", [])
        self.upload_duration = self._histogram("upload_duration_seconds", "First byte to answer.", SECONDS, [])
        self.golden_tests = self._counter("golden_tests", "Self-tests of prompts run.", ["result"])
        self.store_duration = self._histogram(
            "registry_op_duration_seconds", "Calls of the registry.", OPERATION, ["op", "backend"]
        )
        self.drain_state = Gauge(
            PREFIX + "drain_state", "0 serving, 1 leaving, 2 refusing new requests.", registry=self.registry
        )

    def request_done(self, model: str, done: RequestDone) -> None:
        """Count one engine request that went well."""
        times, tokens = done.timings, done.completion_tokens
        self.ttft.labels(model).observe(times.queued + times.prefill)
        self.e2e.labels(model).observe(times.queued + times.prefill + times.decode)
        self.queue_time.labels(model).observe(times.queued)
        self.prefill_time.labels(model).observe(times.prefill)
        self.decode_time.labels(model).observe(times.decode)
        if tokens > 1:
            self.itl.labels(model).observe(times.decode / (tokens - 1))
        self.text_tokens.labels(model).observe(done.text_tokens)
        self.soft_tokens.labels(model).observe(done.soft_tokens)
        self.generated.labels(model).observe(tokens)

    def watch(
        self,
        engine: Callable[[], Engine | None],
        store: Callable[[], StoreStats],
        model_name: str | None,
        version: str,
    ) -> None:
        """Read these two at every scrape. `engine` gives None until there is one."""
        self.registry.register(_Engine(engine, model_name, version))
        self.registry.register(_Store(store))

    def _counter(self, name: str, text: str, labels: Sequence[str], prefix: str = PREFIX) -> Counter:
        return Counter(prefix + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str], prefix: str = PREFIX
    ) -> Histogram:
        return Histogram(prefix + name, text, labels, registry=self.registry, buckets=buckets)


class _Engine(Collector):
    """The engine's own counts."""

    def __init__(self, engine: Callable[[], Engine | None], model_name: str | None, version: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._version = version

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        info, stats = engine.info, engine.stats()
        model = self._model_name or info.model
        for name, text, value in _gauges(info, stats):
            yield _gauge(name, text, {"model_name": model}, value)
        for name, text, value in _counts(stats):
            yield _count(name, text, {"model_name": model}, value)
        aborted = CounterMetricFamily(PREFIX + "request_aborted", "Requests cancelled.", labels=["phase"])
        for phase, number in stats.aborted.items():
            aborted.add_metric([phase], number)
        yield aborted
        loaded = GaugeMetricFamily(PREFIX + "prompt_loaded", "Prompts with resident pages.", labels=["prompt"])
        for digest in stats.loaded_prompts[:LOADED_PROMPTS_SHOWN]:
            loaded.add_metric([digest], 1)
        if more := len(stats.loaded_prompts[LOADED_PROMPTS_SHOWN:]):
            loaded.add_metric(["other"], more)
        yield loaded
        cache = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.num_pages)}
        yield _gauge("cache_config_info", "The KV cache.", cache, 1)
        build = {
            "version": self._version,
            "model_revision": info.weights,
            "level": info.level,
            "dtype": info.dtype,
            "compute": info.compute,
        }
        yield _gauge("build_info", "What runs.", build, 1)


class _Store(Collector):
    """The registry's content and its counts of damage."""

    def __init__(self, stats: Callable[[], StoreStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield _gauge("registry_versions", "Live versions.", {}, stats.versions)
        yield _gauge("registry_blob_bytes", "Bytes of live prompts.", {}, stats.blob_bytes)
        yield _count("blob_integrity_failures", "Damaged blobs met.", {}, stats.integrity_failures)
        yield _count("blob_orphans_removed", "Blobs without a version removed.", {}, stats.orphans_removed)


def _gauges(info: EngineInfo, stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("num_requests_waiting", "Requests in the queue.", stats.waiting),
        ("num_requests_running", "Requests in the batch.", stats.running),
        ("num_tokens_waiting", "Text tokens in the queue.", stats.waiting_tokens),
        ("weight_bytes", "Resident bytes of the weights.", info.weight_bytes),
        ("kv_cache_bytes", "Bytes of all pages.", info.kv_bytes),
        ("kv_cache_usage_perc", "Share of pages in use, 0 to 1.", stats.pages_used / max(1, info.num_pages)),
        (
            "kv_cache_cached_perc",
            "Share of pages that hold a reusable prefix.",
            stats.pages_cached / max(1, info.num_pages),
        ),
        ("engine_last_step_age_seconds", "Since the loop last turned.", stats.last_step_age),
    )


def _counts(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("engine_steps", "Turns of the loop.", stats.steps),
        ("engine_failed_steps", "Steps that failed their requests.", stats.failed_steps),
        ("prompt_tokens", "Text tokens processed.", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ("num_preemptions", "Requests put back for want of pages.", stats.preemptions),
        ("prefix_cache_queries", "Text tokens looked up.", stats.prefix_queries),
        ("prefix_cache_hits", "Text tokens found.", stats.prefix_hits),
        ("soft_prefix_hits", "Requests whose prompt was resident.", stats.soft_prefix_hits),
        ("soft_prefix_misses", "Requests whose prompt was not resident.", stats.soft_prefix_misses),
        ("soft_prefix_restored", "Of the misses, those read from disk.", stats.soft_prefix_restored),
    )


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _count(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
