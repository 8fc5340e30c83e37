"""Prometheus metrics, as a plugin: counts what finished, reads queue and stress when asked, serves `GET /metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

from bus import errors
from bus.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from bus.dispatch import Bus
    from bus.hookspecs import RegisterRoutes
    from bus.model import Record

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
UNKNOWN = "unknown"
"""Stands for overlays that do not exist, so that callers cannot grow the metrics by asking for names. For the same
reason an overlay's own code counts as ERR_OVERLAY_FAILED."""


class Metrics:
    """Counters for records, gauges for the state of the bus at the moment of the scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "aal_calls", "Calls by overlay and outcome code.", ["overlay", "phase", "code"], registry=self._registry
        )
        self._duration = Histogram(
            "aal_call_seconds", "From arrival to outcome.", ["overlay"], buckets=_SECONDS, registry=self._registry
        )
        self._queued = Histogram(
            "aal_queue_seconds", "Time waited for admission.", ["overlay"], buckets=_SECONDS, registry=self._registry
        )
        self._kept: dict[tuple[str, str, str], tuple[Counter, Histogram, Histogram]] = {}

    @hookimpl
    def aal_invocation_finished(self, record: Record) -> None:
        overlay = record["overlay"] if record["manifest_hash"] else UNKNOWN
        code = record["code"] if record["ok"] else errors.entry(record["code"]).code
        calls, duration, queued = self._labelled(overlay, record["phase"] or "", code)
        calls.inc()
        duration.observe(record["duration_ms"] / 1000)
        if record["queue_ms"] is not None:
            queued.observe(record["queue_ms"] / 1000)

    def _labelled(self, overlay: str, phase: str, code: str) -> tuple[Counter, Histogram, Histogram]:
        """The metrics under their labels; kept, since the library takes a lock and checks the labels each time."""
        key = (overlay, phase, code)
        found = self._kept.get(key)
        if found is None:
            found = (self._calls.labels(*key), self._duration.labels(overlay), self._queued.labels(overlay))
            self._kept[key] = found
        return found

    @hookimpl
    def aal_routes(self, register: RegisterRoutes, bus: Bus) -> None:
        self._registry.register(_BusState(bus))
        register([Route("/metrics", self._serve, methods=["GET"])])

    def _serve(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _BusState:
    """A collector in the sense of prometheus_client: asked at each scrape."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def collect(self) -> Iterator[GaugeMetricFamily]:
        scheduler, ledger = self._bus.scheduler, self._bus.ledger
        for name, text, value in (
            ("aal_running", "Calls that run now.", scheduler.running),
            ("aal_waiting", "Calls that wait for admission.", scheduler.waiting),
            ("aal_stress", "RAM stress, 0 to 1.", self._bus.stress.value),
            ("aal_ledger_size", "Lines of the ledger.", ledger.size),
            ("aal_ledger_healthy", "1 where the ledger can be written.", float(ledger.healthy)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
