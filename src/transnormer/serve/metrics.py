"""Figures for Prometheus: those of the engine, and those of the server around it."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from transnormer.infer.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """What the server counts; a registry of its own, so that several can live in one process.

    Attributes:
        requests: answered, by route and status.
        seconds: of a request, by route.
        first_token: seconds from a request to its first token.
        streams: that are open.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "transnormer_http_requests",
            "Requests answered.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "transnormer_http_request_seconds",
            "Seconds of a request, streams to their end.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "transnormer_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.streams = Gauge("transnormer_streams", "Streams open.", registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Show an engine's figures too."""
        self.registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads an engine's counts when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every figure as Prometheus has it."""
        found = self._engine.metrics()
        gauges = {
            "running": (found.running, "Requests that have a slot."),
            "waiting": (found.waiting, "Requests in the queue."),
            "slots": (found.slots, "Requests that may run at once."),
            "state_bytes": (found.state_bytes, "Bytes of the states of all slots."),
        }
        counters = {
            "engine_steps": (found.steps, "Steps of the engine."),
            "engine_step_seconds": (found.step_seconds, "Seconds of all steps."),
            "prompt_tokens": (found.prompt_tokens, "Tokens of prompts that were read."),
            "cached_tokens": (found.cached_tokens, "Tokens of prompts that were known."),
            "generated_tokens": (found.generated_tokens, "Tokens drawn."),
            "engine_submitted": (found.submitted, "Requests that the engine took."),
            "engine_refused": (found.refused, "Requests that found the queue full."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"transnormer_{name}", text, value=value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"transnormer_{name}", text, value=value)
        ended = CounterMetricFamily(
            "transnormer_engine_finished", "Requests that ended.", labels=["reason"]
        )
        for reason, value in found.finished.items():
            ended.add_metric([reason], value)
        yield ended
