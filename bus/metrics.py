"""Prometheus metrics, as a plugin: counts what finished, reads queue and stress when asked, serves `GET /metrics`."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

from bus import errors
from bus.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client import Metric
    from starlette.requests import Request

    from bus.dispatch import Bus
    from bus.hookspecs import RegisterRoutes
    from bus.model import Record


class _Scale(NamedTuple):
    """The buckets of a histogram: its figures are told as they come, divided by `unit`."""

    bounds: tuple[float, ...]
    unit: float

    @property
    def buckets(self) -> tuple[str, ...]:
        return (*(str(bound / self.unit) for bound in self.bounds), "+Inf")


_SECONDS = _Scale((1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000), 1000)
"""Of figures in milliseconds."""

_MIB = _Scale(tuple(2.0**power for power in range(2, 17)), 1)
"""4 MiB to 64 GiB."""

UNKNOWN = "unknown"
"""Stands for overlays that do not exist, so that callers cannot grow the metrics by asking for names. For the same
reason an overlay's own code counts as ERR_OVERLAY_FAILED."""


class _Histogram:
    """A histogram's figures. The library's own take a lock for each bucket and sum, which was most of this plugin."""

    __slots__ = ("_bounds", "_counts", "_scale", "_sum")

    def __init__(self, scale: _Scale) -> None:
        self._scale = scale
        self._bounds = scale.bounds
        self._counts = [0] * (len(scale.bounds) + 1)
        self._sum = 0.0

    def add(self, figure: float) -> None:
        self._counts[bisect_left(self._bounds, figure)] += 1
        self._sum += figure

    def add_to(self, family: HistogramMetricFamily, overlay: str) -> None:
        """For a scrape, which may be in another thread."""
        total = self._sum / self._scale.unit
        counts = accumulate(tuple(self._counts))
        family.add_metric([overlay], list(zip(self._scale.buckets, counts, strict=True)), total)


class Metrics:
    """Counters for records, gauges for the state of the bus at the moment of the scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._calls: dict[tuple[str, ...], int] = {}
        self._durations: dict[str, _Histogram] = {}
        self._queued: dict[str, _Histogram] = {}
        self._peaks: dict[str, _Histogram] = {}
        self._waited: dict[tuple[str, ...], int] = {}
        self._reserved_mb: dict[tuple[str, str], float] = {}
        self._degraded: dict[tuple[str, ...], int] = {}

    @hookimpl
    def aal_invocation_finished(self, record: Record) -> None:
        overlay = record["overlay"] if record["manifest_hash"] else UNKNOWN
        code = record["code"] if record["ok"] else errors.entry(record["code"]).code
        key = (overlay, record["phase"] or "", code)
        self._calls[key] = self._calls.get(key, 0) + 1
        _of(overlay, self._durations, _SECONDS).add(record["duration_ms"])
        if record["queue_ms"] is not None:
            _of(overlay, self._queued, _SECONDS).add(record["queue_ms"])
        if (admission := record["admission"]) is not None:
            for reason in admission["waited_for"]:
                self._waited[reason,] = self._waited.get((reason,), 0) + 1
        if record["memory"] is not None:
            self._count_memory(overlay, record)

    def _count_memory(self, overlay: str, record: Record) -> None:
        """Of a call that ran."""
        memory = record["memory"]
        if memory["peak_mb"] is not None:
            _of(overlay, self._peaks, _MIB).add(memory["peak_mb"])
        self._reserved_mb[overlay, record["capability"]] = record["admission"]["reserved_mb"]
        for applied in memory["applied"]:
            # the steps of a caller's own rune count by their actions alone: callers cannot grow the metrics
            step = applied if record["profile"] is None else applied.partition("(")[0]
            self._degraded[overlay, step] = self._degraded.get((overlay, step), 0) + 1

    @hookimpl
    def aal_routes(self, register: RegisterRoutes, bus: Bus) -> None:
        self._registry.register(_BusState(bus))
        register([Route("/metrics", self._serve, methods=["GET"])])

    def collect(self) -> Iterator[Metric]:
        """A collector in the sense of prometheus_client: asked at each scrape."""
        yield _counter("aal_calls", "Calls by overlay and outcome code.", ["overlay", "phase", "code"], self._calls)
        yield _histogram("aal_call_seconds", "From arrival to outcome.", self._durations)
        yield _histogram("aal_queue_seconds", "Time waited for admission.", self._queued)
        yield _histogram("aal_peak_mb", "Peak memory of calls, in MiB.", self._peaks)
        yield _counter("aal_waited", "Calls that had to wait, by what for.", ["reason"], self._waited)
        what = "Calls that ran with a degradation step in force."
        yield _counter("aal_degraded_calls", what, ["overlay", "step"], self._degraded)
        what = "What the last call reserved of memory, in MiB."
        reserved = GaugeMetricFamily("aal_reserved_mb", what, labels=["overlay", "capability"])
        for where, mb in list(self._reserved_mb.items()):
            reserved.add_metric(where, mb)
        yield reserved

    def _serve(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def _of(overlay: str, kept: dict[str, _Histogram], scale: _Scale) -> _Histogram:
    found = kept.get(overlay)
    if found is None:
        found = kept[overlay] = _Histogram(scale)
    return found


def _counter(name: str, text: str, labels: list[str], counts: Mapping[tuple[str, ...], int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, count in list(counts.items()):
        family.add_metric(key, count)
    return family


def _histogram(name: str, text: str, kept: dict[str, _Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=["overlay"])
    for overlay, figures in list(kept.items()):
        figures.add_to(family, overlay)
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
            ("aal_memory_room_mb", "Memory that calls may claim together, in MiB.", scheduler.room_mb),
            ("aal_memory_claimed_mb", "What running calls claim of it.", scheduler.claimed_mb),
            ("aal_event_readers", "Who listens to GET /events.", float(self._bus.events.readers)),
            ("aal_ledger_size", "Lines of the ledger.", ledger.size),
            ("aal_ledger_healthy", "1 where the ledger can be written.", float(ledger.healthy)),
            (
                "aal_ledger_refuses_to_sign",
                "1 where its key has signed another log.",
                float(ledger.unsigned is not None),
            ),
        ):
            if math.isfinite(value):  # the room is not, before the first look at the machine
                yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("aal_evictions", "Calls that were ended to free memory.", value=scheduler.evictions)
        yield self._steps()
        refused = CounterMetricFamily(
            "aal_refused_requests",
            "Requests refused from nobody known, and calls that came too soon again.",
            labels=["code"],
        )
        for code, count in list(self._bus.refused_before_auth.items()):
            refused.add_metric([code], count)
        yield refused

    def _steps(self) -> Metric:
        """Peaks with and without come of calls with different payloads: a hint, and no proof, of what a step saves."""
        family = GaugeMetricFamily(
            "aal_step_median_mb",
            "Median peak memory of the last calls with a degradation step in force, and without, in MiB.",
            labels=["overlay", "capability", "step", "with"],
        )
        for key, step, is_with, median_mb in self._bus.needs.steps():
            overlay, _, capability = key.partition(".")
            family.add_metric([overlay, capability, step, "yes" if is_with else "no"], median_mb)
        return family
