"""What calls really needed of memory, by their peaks: what the next one reserves, and what degradation bought.

A capability is known by `overlay.capability`. Until `LEARNED` of its calls were measured its next one reserves its
SOFT, but no more than a part of the room, unless one was seen to need it: many declare far too much, and would stand in
everybody's way until they are known. Then it is the 95th percentile of the last peaks, times the factor of its VOL, and
never more than its HARD. What was learned outlives the process, as it stands in the ledger: `Needs.recall` reads the
last lines.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bus.claims import Need

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from bus.model import Capability, Manifest, Record
    from bus.runes import MemoryProfile, Volatility

RECALLED_BYTES = 32 * 2**20
"""No more of the ledger is read for it, as lines may hold payloads."""

RECALLED = 5000
"""The last lines of the ledger that tell what calls needed of memory."""

LEARNED = 20
"""Measured calls from which on the reservation is learned."""

UNLEARNED_SHARE = 0.25
"""The part of the room that a call reserves at most of which too little is known."""

UNLEARNED_LEAST_MB = 64.0
"""What that is at least, however small the room: else calls would fit that need more than there is."""

KEPT = 100
"""The last measured calls of a capability that count."""

AFTER = 25
"""Calls after which what was learned is looked at anew."""

QUANTILE = 0.95

VOL_FACTORS: dict[Volatility, float] = {"LOW": 1.1, "MED": 1.25, "HIGH": 1.5}
"""By what the volatility (VOL) of a rune multiplies what was measured."""

UNLEARNED_SETTLED_S = 1.0
"""For how many seconds a call must not have grown that nothing is known of, to be taken to have grown."""

PAUSE_FACTOR, PAUSE_MORE_S = 1.25, 0.05
"""By what the longest pause of calls before they grew again is multiplied, and what is added: looks are apart."""

TENTH = 0.1

_LOWER_BOUNDS = frozenset(
    {"ERR_TIMEOUT", "ERR_CANCELLED", "ERR_EVICTED", "ERR_SHUTTING_DOWN", "ERR_OUTPUT_TOO_LARGE", "ERR_OVERLAY_CRASH"}
)
"""Calls that were ended before their time: they might have needed more than was measured."""

Verdict = Literal["above soft", "below a tenth of soft"]


class Learned(NamedTuple):
    """What one call tells: its peak in MiB, how it ended, its longest pause before it grew again, in seconds.

    `applied` are the degradation steps in force, None where they are those of a profile that its caller named and not
    of the capability's own rune. `payload_hash` is empty where it is not known.
    """

    peak_mb: float
    code: str
    paused_s: float
    applied: tuple[str, ...] | None = ()
    payload_hash: str = ""


@dataclass(slots=True)
class _History:
    """The last measured calls of a capability. `p95_mb`, `mean_mb` and `settled_after_s` are what they come to."""

    calls: deque[Learned] = field(default_factory=lambda: deque(maxlen=KEPT))
    p95_mb: float | None = None
    mean_mb: float = 0.0
    settled_after_s: float = UNLEARNED_SETTLED_S
    need: tuple[MemoryProfile, Need] | None = None
    """The last that was made of them, and of which profile."""
    _new: int = 0

    @property
    def most_mb(self) -> float:
        return max((call.peak_mb for call in self.calls), default=0.0)

    def add(self, measured: Learned) -> None:
        """A larger one than expected counts at once, the others together with some more: sorting takes its time."""
        self.calls.append(measured)
        self._new += 1
        is_due = self.p95_mb is None or self._new >= AFTER or measured.peak_mb > self.p95_mb
        if len(self.calls) >= LEARNED and is_due:
            self._new = 0
            self.need = None
            peaks = [call.peak_mb for call in self.calls]
            self.p95_mb = quantile(peaks)
            self.mean_mb = fmean(peaks)
            self.settled_after_s = PAUSE_FACTOR * quantile(call.paused_s for call in self.calls) + PAUSE_MORE_S


class Needs:
    """The histories of a bus."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def of(
        self,
        key: str,
        profile: MemoryProfile,
        *,
        room_mb: float = math.inf,
        shared: str | None = None,
        processes: int = 1,
    ) -> Need:
        """What the next call of a capability needs, in a room of so much; `shared` and `processes` as in `Need`."""
        history = self._histories.get(key)
        factor = VOL_FACTORS[profile.volatility]
        if history is None or history.p95_mb is None:
            seen_mb = 0.0 if history is None else history.most_mb * factor
            most_mb = max(UNLEARNED_SHARE * room_mb, UNLEARNED_LEAST_MB)
            mb = min(profile.hard_mb, max(seen_mb, min(profile.soft_mb, most_mb)))
            return Need(mb, profile.hard_mb, mb, "declared", UNLEARNED_SETTLED_S, factor, shared, processes)
        if history.need is not None and history.need[0] is profile:
            known = history.need[1]
            if known.shared == shared and known.processes == processes:
                return known
        mb = min(profile.hard_mb, history.p95_mb * factor)
        usual_mb = min(mb, history.mean_mb)
        need = Need(mb, profile.hard_mb, usual_mb, "measured", history.settled_after_s, factor, shared, processes)
        history.need = profile, need
        return need

    def learn(self, key: str, learned: Learned) -> None:
        """A call has ended, of which a peak was measured."""
        history = self._histories.setdefault(key, _History())
        if learned.code in _LOWER_BOUNDS and learned.peak_mb <= (history.p95_mb or 0.0):
            return
        history.add(learned)

    def recall(self, records: Iterable[Record]) -> None:
        """Learn from lines of the ledger, oldest first. A line that nobody verified may say anything."""
        for record in records:
            if (learned := _learned_of(record)) is not None:
                self.learn(f"{record.get('overlay')}.{record.get('capability')}", learned)

    def peaks_mb(self, key: str) -> list[float]:
        """Those of the last measured calls, in MiB, oldest first."""
        return [call.peak_mb for call in self._calls(key)]

    def report(self, key: str, profile: MemoryProfile, room_mb: float = math.inf) -> dict[str, Any]:
        """What is known of a capability, as JSON: figures in MiB, and what each degradation step bought."""
        calls = self._calls(key)
        peaks = [call.peak_mb for call in calls]
        need = self.of(key, profile, room_mb=room_mb)
        return {
            "measured_calls": len(peaks),
            "median_mb": _rounded(median(peaks)) if peaks else None,
            "p95_mb": _rounded(quantile(peaks)) if peaks else None,
            "peak_mb": _rounded(max(peaks)) if peaks else None,
            "reserved_mb": _rounded(need.mb),
            "basis": need.basis,
            "finding": verdict(peaks, profile.soft_mb),
            "degradation": _bought(calls, profile),
        }

    def told(self, manifest: Manifest, *, reserves: bool, room_mb: float = math.inf) -> dict[str, dict[str, Any]]:
        """The `report` of each capability of an overlay, by name; `reserves` is whether calls are admitted by memory.

        What somebody else's service does reserves nothing of ours.
        """
        reports = {}
        for name, capability in manifest.capabilities.items():
            reports[name] = self.report(f"{manifest.name}.{name}", capability.memory, room_mb)
            if not reserves or is_external(manifest, capability):
                reports[name] |= {"reserved_mb": 0.0, "basis": "none"}
        return reports

    def findings(self, manifest: Manifest) -> list[str]:
        """Those of its capabilities that declare far from what they need, each with its figures and what to do."""
        return [said for each in manifest.capabilities.values() if (said := self._finding(manifest, each)) is not None]

    def _finding(self, manifest: Manifest, capability: Capability) -> str | None:
        peaks, soft_mb = self.peaks_mb(f"{manifest.name}.{capability.name}"), capability.memory.soft_mb
        match verdict(peaks, soft_mb):
            case "above soft":
                said = f"stays above its SOFT of {soft_mb} MiB: half of its last {len(peaks)} calls had"
                said += f" {median(peaks):.1f} MiB or more"
            case "below a tenth of soft":
                said = f"stays under a tenth of its SOFT of {soft_mb} MiB: 95 % of its last {len(peaks)} calls had"
                said += f" {quantile(peaks):.1f} MiB or less"
            case None:
                return None
        which = f" --capability {capability.name}" if len(manifest.capabilities) > 1 else ""
        return f"{capability.name}: {said}; aal overlays profile {manifest.name}{which} proposes a rune"

    def steps(self) -> Iterator[tuple[str, str, bool, float]]:
        """For each degradation step that was in force: of which capability, with it or without, and the median peak.

        Peaks in MiB, of the last measured calls. May be asked from another thread.
        """
        for key in list(self._histories):
            calls = [call for call in self._calls(key) if call.applied is not None]
            for step in dict.fromkeys(step for call in calls for step in call.applied or ()):
                for is_with, peaks in _apart(calls, step).items():
                    if peaks:
                        yield key, step, is_with, _rounded(median(peaks))

    def _calls(self, key: str) -> tuple[Learned, ...]:
        """A copy, made at once: a scrape asks from another thread."""
        history = self._histories.get(key)
        return () if history is None else tuple(history.calls)


def is_external(manifest: Manifest, capability: Capability) -> bool:
    """Whether somebody else's service does the work, whose memory nobody sees."""
    return capability.runner == "http" and manifest.service is None


def _learned_of(record: Record) -> Learned | None:
    """What a line of the ledger tells of memory; None where it tells nothing."""
    memory, took_ms, queued_ms = record.get("memory"), record.get("duration_ms"), record.get("queue_ms") or 0
    if record.get("type") != "invoke" or not isinstance(memory, dict) or not isinstance(took_ms, int | float):
        return None
    peak_mb, applied = memory.get("peak_mb"), memory.get("applied")
    if not isinstance(peak_mb, int | float) or not isinstance(applied, list):
        return None
    own = tuple(map(str, applied)) if record.get("profile") is None else None
    ran_s = (took_ms - (queued_ms if isinstance(queued_ms, int | float) else 0)) / 1000
    return Learned(peak_mb, str(record.get("code")), ran_s, own, str(record.get("payload_hash") or ""))


def quantile(figures: Iterable[float]) -> float:
    """The nearest-rank 95th percentile: the smallest figure that no more than a twentieth of them exceed."""
    ordered = sorted(figures)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1]


def verdict(peaks_mb: list[float], soft_mb: int) -> Verdict | None:
    """Whether what is declared is far from what is measured: of no call, where too few were measured."""
    if len(peaks_mb) < LEARNED:
        return None
    if median(peaks_mb) > soft_mb:
        return "above soft"
    return "below a tenth of soft" if quantile(peaks_mb) < TENTH * soft_mb else None


def _bought(calls: Sequence[Learned], profile: MemoryProfile) -> list[dict[str, Any]]:
    """For each step of the rune: of how many calls it was in force, and the median peaks with it and without.

    Calls with and without differ in their payloads and in the other steps as well. `saved_mb` leaves both out: it is
    the median, over those payloads that were called with the steps up to this one and with those before it only, of
    the difference of their median peaks; None where there is no such payload. Negative is more memory with the step.
    """
    steps = tuple(map(str, profile.steps))
    own = [call for call in calls if call.applied is not None]
    levels = [_by_payload(call for call in own if call.applied == steps[:level]) for level in range(len(steps) + 1)]
    told = []
    for step, before, with_it in zip(steps, levels, levels[1:], strict=False):
        peaks = _apart(own, step)
        alike = before.keys() & with_it.keys()
        saved = [median(before[payload]) - median(with_it[payload]) for payload in alike]
        told.append(
            {
                "step": step,
                "calls": len(peaks[True]),
                "median_with_mb": _rounded(median(peaks[True])) if peaks[True] else None,
                "median_without_mb": _rounded(median(peaks[False])) if peaks[False] else None,
                "payloads": len(alike),
                "saved_mb": _rounded(median(saved)) if saved else None,
            }
        )
    return told


def _apart(calls: Iterable[Learned], step: str) -> Mapping[bool, list[float]]:
    """The peaks of calls with the step, and of those without."""
    peaks: Mapping[bool, list[float]] = {True: [], False: []}
    for call in calls:
        peaks[step in (call.applied or ())].append(call.peak_mb)
    return peaks


def _by_payload(calls: Iterable[Learned]) -> dict[str, list[float]]:
    peaks: defaultdict[str, list[float]] = defaultdict(list)
    for call in calls:
        if call.payload_hash:
            peaks[call.payload_hash].append(call.peak_mb)
    return dict(peaks)


def _rounded(mb: float) -> float:
    return round(float(mb), 1)  # whole ones come back from the ledger as integers
