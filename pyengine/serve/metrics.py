"""Metrics for Prometheus, in a registry of their own. No label holds an id or a prompt."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pyengine.serve.service import Service

__all__ = ["Metrics"]

INTERVALS = (0.01, 0.02, 0.03, 0.04, 0.0425, 0.045, 0.05, 0.0625, 0.083, 0.125, 0.25, 0.5, 1)
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10)


class Metrics:
    """Counters and histograms by attribute; gauges are read from the service when they are asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"pyengine_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Any:
            return Histogram(f"pyengine_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.frames_sent = counter("frames_sent", "Frames handed to sockets.", "format")
        self.frames_dropped = counter(
            "frames_dropped", "Frames replaced by newer ones before they were sent."
        )
        self.bytes_sent = counter("bytes_sent", "Bytes of frames handed to sockets.", "format")
        self.frames_written = counter("frames_written", "Frames written to the videos of jobs.")
        self.started = counter("sessions_started", "Sessions and jobs begun.")
        self.ended = counter("sessions_ended", "Sessions and jobs ended.", "reason")
        self.rejected = counter("sessions_rejected", "Sessions and jobs refused for want of room.", "reason")
        self.jobs = counter("jobs_finished", "Jobs that are done.", "state")
        self.recoveries = counter("recoveries", "Sessions made again from their logs.", "reason")
        self.refused = counter("messages_refused", "Messages of clients that were refused.", "reason")
        self.first_frame = histogram(
            "first_frame_seconds", "From a start to its first frame sent.", LATENCIES
        )
        self.switch = histogram(
            "prompt_switch_seconds", "From a prompt to the call it takes effect at.", LATENCIES
        )
        self.interval = histogram("frame_interval_seconds", "Between frames sent to one socket.", INTERVALS)
        self.encode = histogram("encode_seconds", "Encoding of a piece.", LATENCIES, "format")
        self.seconds = histogram("call_seconds", "A call of the network.", LATENCIES, "streams")

    def call(self, streams: int, seconds: float) -> None:
        """Notes a call of so many streams."""
        self.seconds.labels(str(streams)).observe(seconds)

    def watch(self, service: Service) -> None:
        """Has the service's gauges from now on."""
        self.registry.register(_Gauges(service))

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        service = self._service
        states = Count(session.state for session in list(service.scheduler.sessions.values()))
        sessions = GaugeMetricFamily("pyengine_sessions", "Sessions by state.", labels=["state"])
        for state in ("playing", "paused", "parked", "ended", "failed"):
            sessions.add_metric([state], states[state])
        yield sessions
        memory = GaugeMetricFamily("pyengine_memory_bytes", "Bytes by kind.", labels=["kind"])
        memory.add_metric(["reserved"], service.admission.bytes)
        memory.add_metric(["engine"], service.engine.nbytes)
        yield memory
        if service.options.memory is not None:
            yield GaugeMetricFamily(
                "pyengine_memory_limit_bytes", "Bytes that may be reserved.", service.options.memory
            )
        yield GaugeMetricFamily("pyengine_ready", "1 while sessions are admitted.", int(service.ready))
        build = GaugeMetricFamily("pyengine_build_info", "The version that runs.", labels=["version"])
        build.add_metric([metadata.version("pyengine-video")], 1)
        yield build
