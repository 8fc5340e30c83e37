"""Prometheus metrics, as a plugin: counts what finished, reads queue and stress when asked, serves `GET /metrics`."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

from bus import errors
from bus.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric
    from starlette.requests import Request

    from bus.dispatch import Bus
    from bus.hookspecs import RegisterRoutes
    from bus.model import Record

_BOUNDS_MS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000)
_BUCKETS = (*(str(bound / 1000) for bound in _BOUNDS_MS), "+Inf")
UNKNOWN = "unknown"
"""Stands for overlays that do not exist, so that callers cannot grow the metrics by asking for names. For the same
reason an overlay's own code counts as ERR_OVERLAY_FAILED."""


class _Times:
    """A histogram's figures. The library's own take a lock for each bucket and sum, which was most of this plugin."""

    __slots__ = ("_counts", "_sum_ms")

    def __init__(self) -> None:
        self._counts = [0] * len(_BUCKETS)
        self._sum_ms = 0.0

    def add(self, ms: float) -> None:
        self._counts[bisect_left(_BOUNDS_MS, ms)] += 1
        self._sum_ms += ms

    def add_to(self, family: HistogramMetricFamily, overlay: str) -> None:
        """For a scrape, which may be in another thread."""
        sum_s = self._sum_ms / 1000
        family.add_metric([overlay], list(zip(_BUCKETS, accumulate(tuple(self._counts)), strict=True)), sum_s)


class Metrics:
    """Counters for records, gauges for the state of the bus at the moment of the scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._calls: dict[tuple[str, str, str], int] = {}
        self._durations: dict[str, _Times] = {}
        self._queued: dict[str, _Times] = {}

    @hookimpl
    def aal_invocation_finished(self, record: Record) -> None:
        overlay = record["overlay"] if record["manifest_hash"] else UNKNOWN
        code = record["code"] if record["ok"] else errors.entry(record["code"]).code
        key = (overlay, record["phase"] or "", code)
        self._calls[key] = self._calls.get(key, 0) + 1
        _times(self._durations, overlay).add(record["duration_ms"])
        if record["queue_ms"] is not None:
            _times(self._queued, overlay).add(record["queue_ms"])

    @hookimpl
    def aal_routes(self, register: RegisterRoutes, bus: Bus) -> None:
        self._registry.register(_BusState(bus))
        register([Route("/metrics", self._serve, methods=["GET"])])

    def collect(self) -> Iterator[Metric]:
        """A collector in the sense of prometheus_client: asked at each scrape."""
        calls = CounterMetricFamily(
            "aal_calls", "Calls by overlay and outcome code.", labels=["overlay", "phase", "code"]
        )
        for key, count in list(self._calls.items()):
            calls.add_metric(key, count)
        yield calls
        yield _histogram("aal_call_seconds", "From arrival to outcome.", self._durations)
        yield _histogram("aal_queue_seconds", "Time waited for admission.", self._queued)

    def _serve(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def _times(kept: dict[str, _Times], overlay: str) -> _Times:
    found = kept.get(overlay)
    if found is None:
        found = kept[overlay] = _Times()
    return found


def _histogram(name: str, text: str, kept: dict[str, _Times]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=["overlay"])
    for overlay, times in list(kept.items()):
        times.add_to(family, overlay)
    return family


class _BusState:
    """What the bus knows itself, a collector as well."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        scheduler, ledger = self._bus.scheduler, self._bus.ledger
        for name, text, value in (
            ("aal_running", "Calls that run now.", scheduler.running),
            ("aal_waiting", "Calls that wait for admission.", scheduler.waiting),
            ("aal_stress", "RAM stress, 0 to 1.", self._bus.stress.value),
            ("aal_ledger_size", "Lines of the ledger.", ledger.size),
            ("aal_ledger_healthy", "1 where the ledger can be written.", float(ledger.healthy)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        refused = CounterMetricFamily(
            "aal_refused_requests",
            "Requests refused from nobody known, and calls that came too soon again.",
            labels=["code"],
        )
        for code, count in list(self._bus.refused_before_auth.items()):
            refused.add_metric([code], count)
        yield refused
