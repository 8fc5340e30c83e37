"""The bus itself. `Bus.invoke` is the story of one call, from the request to the line in the ledger.

A refusal on the way is a `BusError`, and whatever a started overlay does is an `Outcome`; `invoke` makes both into a
ledger line and an `Answer`, and the answer leaves only after its line is in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from bus import envelopes, policy, provenance, purges, schemas
from bus.balance import Balance
from bus.callers import Callers
from bus.canonical import figure
from bus.claims import NO_NEED
from bus.course import Course
from bus.degradation import memory_block
from bus.errors import BusError, DeniedError
from bus.events import Events
from bus.ledger import Ledger, LedgerError
from bus.ledger_key import LedgerKey
from bus.model import Phase, Told, now_ms
from bus.needs import RECALLED, RECALLED_BYTES, Learned, Needs, is_external
from bus.overlays import Registry
from bus.plugins import Plugins, spared
from bus.profiles import Profiles
from bus.records import collect_environment, environment_hash
from bus.scheduler import Scheduler
from bus.secrets import Secrets
from bus.settings import stores_payload
from bus.starts import PHASES, Starts
from bus.stress import StressMonitor
from bus.targets import Targets
from runners.base import LARGE_BYTES, Code, Job, Outcome, Sandbox, shared_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    from jsonschema import Draft202012Validator

    from bus.admission import Ticket
    from bus.callers import Caller
    from bus.claims import Need
    from bus.course import Answer
    from bus.ledger import Receipt
    from bus.model import Capability, Invocation, Manifest, Record
    from bus.overlays import Resolved
    from bus.runes import MemoryProfile
    from bus.settings import Settings
    from runners.base import Rights, Runner

log = logging.getLogger(__name__)

VALIDATORS_KEPT = 1024
LAST_LINES_S = 5.0
"""How long closing waits for the lines of calls that were ended."""
_HELD_PHASES = frozenset({Phase.CLEAR, Phase.SEAL})
"""Those that promise what the kernel has to hold: no network, and in the one no writing either."""
_WITHDRAWN = frozenset({"ERR_UNKNOWN_OVERLAY", "ERR_OVERLAY_DISABLED"})


@dataclass(slots=True)
class _Line:
    """A record on its way into the ledger, and its answer, made while the disk is waited for."""

    course: Course
    outcome: Outcome
    record: Record
    answer: Answer | None = None
    written: asyncio.Future[Receipt] = field(init=False)

    def prepare(self, receipt: Receipt) -> None:
        with contextlib.suppress(TypeError):  # what came of a plugin's runner is no JSON; who needs the answer is told
            self.answer = self.course.answer(self.outcome, self.record, receipt)


class Bus:
    """Owns the registry, the scheduler, the ledger, the plugins and their runners. One event loop, one Bus."""

    def __init__(
        self, settings: Settings, *, plugins: Iterable[object] = (), environment: Mapping[str, Any] | None = None
    ) -> None:
        """`environment` is what its calls run in; of the folder that the overlays lie in where it is not given."""
        self.settings = settings
        self.callers = Callers(
            settings.state, local_phases=settings.listed("local_phases"), needs_token=not settings.is_loopback
        )
        self.secrets = Secrets(settings.state, settings.secrets)
        self.refused_before_auth: Counter[str] = Counter()
        self.plugins = Plugins(settings, plugins, redact=self.secrets.redactor.raw)
        self.confinement = self.plugins.confinement
        self.runners = self.plugins.runners()
        self.profiles = Profiles(settings.profiles)
        self.registry = Registry(
            settings.overlays,
            settings.state,
            check=self.plugins.check_overlay,
            default_timeout_s=settings.timeout_s,
            runners=self.runners.keys(),
            profiles=self.profiles,
        )
        self.targets = Targets(settings, self.secrets)
        self.balance = Balance(settings, self.runners, self.targets.purged_under_stress)
        self.stress = StressMonitor(self.plugins.stress_sources(), rooms=self.balance.rooms)
        self.scheduler = Scheduler(
            slots=settings.slots,
            queue_limit=settings.queue_limit,
            stress=lambda: self.stress.value,
            is_short=self.balance.is_short,
        )
        self.balance.between(self.stress, self.scheduler)
        self.needs = Needs()
        self.events = Events()
        self.environment = environment or collect_environment(settings.overlays.parent)
        self.environment_hash = environment_hash(self.environment)
        self.notary = LedgerKey(settings.state).notary()
        """Signs all that this Bus signs, whatever becomes of the key's file meanwhile; None where there was no key."""
        self.ledger = Ledger(
            settings.ledger,
            fsync=settings.fsync,
            environment=self.environment,
            more=lambda: self.scheduler.running > 0,
            notary=self.notary,
            segment_bytes=settings.ledger_segment_bytes,
        )
        self.starts = Starts(self.ledger)
        self._resolved: dict[tuple[str, str | None], Resolved] = {}
        self._sandboxes: dict[Sandbox, Mapping[str, Any]] = {}
        self._served: set[str] = set()
        self._at_once = False
        self._validators: dict[tuple[str, str, str], Draft202012Validator] = {}
        self.is_started = False
        self._tasks: list[asyncio.Task[None]] = []
        self._finishing: set[asyncio.Task[Answer]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, *, watch: bool = True) -> None:
        """Load the overlays, open the ledger, begin to sample and to watch. Does nothing the second time.

        Calls that were cut off when another process ended are marked in the ledger.

        Raises `SettingError` where the list of disabled overlays cannot be read.
        """
        if self.is_started:
            return
        self.registry.load()
        self.ledger.open(serves=watch)
        self.stress.prime()
        self._take_sample()
        if watch:
            with contextlib.suppress(OSError):  # a ledger that cannot be read: then no call starts either
                self.needs.recall(provenance.tail(self.settings.ledger, RECALLED, most_bytes=RECALLED_BYTES))
            self._tasks = [
                asyncio.create_task(self.registry.watch(on_look=self._forget_all_but), name="watch overlays"),
                asyncio.create_task(
                    self.stress.run(self.settings.stress_period_s, self._take_sample), name="sample stress"
                ),
            ]
        self.is_started = True
        await self.starts.close_left()

    def stress_report(self) -> dict[str, Any]:
        """As `schemas/stress.schema.json` has it: how short memory is, and what runs and waits."""
        return self.stress.report() | {"scheduler": self.scheduler.report()}

    def _take_sample(self) -> None:
        """There is a new sample of the stress: admission first, then who listens."""
        self.balance.sampled()
        self.events.publish("stress", self.stress.sampled, self.stress_report)

    async def drain(self) -> None:
        """Refuse what comes, let what runs finish within `drain_s`, end the rest. Refusals still leave their lines."""
        self.events.close()
        self.scheduler.close()
        if not self._at_once and not await self.scheduler.drain(self.settings.drain_s):
            log.warning("ending %d calls that did not finish in %s s", self.scheduler.running, self.settings.drain_s)
        await self.end_calls()

    async def end_calls(self, *, at_once: bool = False) -> None:
        """End every call that runs, now; each is answered and leaves its line.

        `at_once` leaves out the grace that a TERM gives, also where an earlier call of this still waits for it.
        """
        self.scheduler.close()
        self._at_once = self._at_once or at_once
        await asyncio.gather(*map(self._close_runner, self.runners.values()))
        await self.scheduler.drain(LAST_LINES_S)

    async def _close_runner(self, runner: Runner) -> None:
        with spared(runner, "be closed"):
            await runner.close(at_once=self._at_once)

    async def close(self) -> None:
        """Drain, and write the last lines. A Bus is not started again."""
        try:
            await self.drain()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, *self._finishing, return_exceptions=True)
            await asyncio.to_thread(self.ledger.close)
            self.starts.close()

    @property
    def is_closing(self) -> bool:
        """Whether calls are refused because the bus is about to end, or has."""
        return self.scheduler.closed

    async def not_ready(self) -> str | None:
        """Why no call could be made now, or None where one could."""
        await self.start()
        if self.is_closing:
            return "the bus is shutting down"
        if not await asyncio.to_thread(self.ledger.probe):
            return self.ledger.reason
        return None

    async def invoke(self, call: Invocation, caller: Caller | None = None) -> Answer:
        """Make one call, of a known `caller` or of the operator.

        Raises nothing but `asyncio.CancelledError`, and that leaves its line too.
        """
        course = Course.of_call(call)
        try:
            if caller is not None:
                caller.require_call(call.overlay, call.phase)
            resolved = course.resolved = self._resolve(call)
            course.run_id = envelopes.run_id(resolved.manifest, resolved.capability, call)
            _require_name(caller, resolved.manifest)
            rights = policy.authorize(resolved.manifest, resolved.capability, call.phase, call.payload)
            self.plugins.authorize(call, resolved.manifest)
            self._require_sandbox(resolved, call.phase, rights)
            self._require_secrets(resolved)
            await self._check_input(resolved, call)
            self._require_ledger()
            outcome = await self._admit_and_run(course, call, resolved, rights)
            if outcome.code == Code.EVICTED:
                outcome = await self._run_again(course, call, resolved, rights, outcome)
        except BusError as refusal:
            outcome = course.refuse(refusal)
        except asyncio.CancelledError:
            await self._finish_alone(course, self._cut_off(Outcome(Code.CANCELLED, error="the caller went away")))
            raise
        except Exception as error:
            log.exception("call %s failed inside the bus", call.request_id)
            outcome = course.refuse(BusError("ERR_INTERNAL", f"{type(error).__name__} in the bus"))
        return await self._finish(course, outcome)

    async def refuse(
        self, error: BusError, overlay: str, capability: str | None = None, caller: str | None = None
    ) -> Answer:
        """Answer a request that could not be read as an invocation, or was not to be, and write it down."""
        course = Course.of_request(overlay, capability, caller)
        return await self._finish(course, course.refuse(error))

    def _resolve(self, call: Invocation) -> Resolved:
        """What the call goes to. An overlay that is no longer offered keeps nothing. Raises as `Registry.resolve`.

        The calls of one turn of the loop are resolved alike, by one look at the disk: whatever is asked for in this
        turn arrived before it began, and so before the look.
        """
        target = (call.overlay, call.capability)
        if resolved := self._resolved.get(target):
            return resolved
        try:
            resolved = self._look_up(*target)
        except BusError as refusal:
            if refusal.code in _WITHDRAWN:  # the watch tells of it, too, where there is one
                self._forget(call.overlay.partition(".")[0])
            raise
        if not self._resolved:
            asyncio.get_running_loop().call_soon(self._resolved.clear)
        self._resolved[target] = resolved
        return resolved

    def _look_up(self, overlay: str, capability: str | None) -> Resolved:
        """As `Registry.resolve`. Where what its processes were given has gone or changed, it is another edition."""
        resolved = self.registry.resolve(overlay, capability)
        if not self.targets.are_outdated(resolved):
            return resolved
        self.registry.renew(resolved.manifest.name)
        return self.registry.resolve(overlay, capability)

    def _forget_all_but(self, offered: Set[str]) -> None:
        """Have the runners end what they keep for overlays that are removed or disabled.

        A call that was let through before may start something after it was forgotten: so this looks again and again. A
        broken overlay keeps what it has. It may be half edited; once it is sound, its new edition replaces the old.
        """
        for name in self._served - offered:
            self._forget(name)

    def _forget(self, name: str) -> None:
        if name not in self._served:
            return
        self._served.discard(name)
        self.targets.forget(name)
        for runner in self.runners.values():
            with spared(runner, f"forget the overlay {name}"):
                runner.forget(name)

    async def _check_input(self, resolved: Resolved, call: Invocation) -> None:
        if resolved.capability.input_schema is None:
            return
        validator = self._validator(resolved, "input", resolved.capability.input_schema)
        if len(call.payload_json) > LARGE_BYTES:
            await asyncio.to_thread(envelopes.check_input, resolved.capability, validator, call.payload)
        else:
            envelopes.check_input(resolved.capability, validator, call.payload)

    def _require_sandbox(self, resolved: Resolved, phase: Phase, rights: Rights) -> None:
        """Under `AAL_SANDBOX=enforce` what the kernel cannot hold does not start. Raises `DeniedError`."""
        if self.settings.sandbox != "enforce":
            return
        manifest, capability = resolved.manifest, resolved.capability
        if (
            capability.runner == "http"
            and phase in _HELD_PHASES
            and manifest.name not in self.settings.listed("trusted")
        ):
            what = "a service of all its phases" if manifest.service else "another program's service"
            raise DeniedError("ERR_SANDBOX", f"{manifest.name} is {what}, so nothing can be held to phase {phase}")
        if links := self.registry.entry(manifest.name).links:
            raise DeniedError("ERR_SANDBOX", f"links lead out of the folder of {manifest.name}: {'; '.join(links)}")
        if capability.runner == "proc" and (why := self.confinement.lacking(rights)):
            raise DeniedError("ERR_SANDBOX", why)

    def _require_secrets(self, resolved: Resolved) -> None:
        """Raises `DeniedError` (ERR_SECRET) for one that the overlay asks for and cannot have."""
        if resolved.manifest.secrets:
            self.targets.prepare(resolved)

    def purge(self, name: str) -> dict[str, int]:
        """Tell an overlay, as the operator asks, to let go of its caches: how many workers or services, by runner.

        Raises as `Registry.entry`, and `DeniedError` (ERR_NO_PURGE) for one that does not take it.
        """
        manifest = self.registry.entry(name).usable()
        purges.require_on_event(manifest)
        return self.balance.purge({manifest.name}).get(manifest.name, {})

    def _require_ledger(self) -> None:
        """What cannot be written down does not start. The refusal's own line is the next try to write."""
        if not self.ledger.healthy:
            raise LedgerError(self.ledger.reason or "the ledger is not open", self.ledger.hint)

    async def _admit_and_run(self, course: Course, call: Invocation, resolved: Resolved, rights: Rights) -> Outcome:
        """Wait for room, then run. Waiting counts against the deadline, which a caller may only bring nearer."""
        manifest, capability = resolved.manifest, resolved.capability
        profile = self.profiles.resolve(call.profile) if call.profile else capability.memory
        course.timeout_ms = min(max(1, round(capability.timeout_s * 1000)), call.timeout_ms or sys.maxsize)
        key = f"{manifest.name}.{capability.name}"
        need = self._need(key, manifest, capability, call.phase, profile)
        admission = course.admission = self.scheduler.admit(
            key,
            profile.priority,
            course.deadline,
            capability.concurrency,
            overlay=manifest.name,
            need=need,
            arrived=call.received,
        )
        async with admission as ticket:
            course.queue_ms = figure(course.queued_before_ms + ticket.queued_s * 1000)
            if call.phase in PHASES:
                await self.starts.begin(course.asked(self.environment_hash))
            told = course.told = self._tell(call, capability, profile, str(course.run_id))
            job = self._job(call, resolved, told, rights, ticket)
            outcome = await self.runners[capability.runner].run(job)
            course.sandbox = self._sandbox_of(outcome)
            outcome = await self._judge(course, resolved, outcome)  # within the slot: closing waits for slots
            if outcome.peak_mb is not None and call.replay_of is None:
                applied = None if call.profile else tuple(told.memory["applied"])
                payload_hash = course.payload_hash or ""
                learned = Learned(outcome.peak_mb, outcome.code, ticket.paused_s, applied, payload_hash)
                self.needs.learn(key, learned)
            return outcome

    async def _run_again(
        self, course: Course, call: Invocation, resolved: Resolved, rights: Rights, outcome: Outcome
    ) -> Outcome:
        """Run what was ended to free memory once more, and again, where running twice does no harm."""
        may_repeat = call.phase is Phase.CLEAR or resolved.capability.idempotent or resolved.manifest.deterministic
        while outcome.code == Code.EVICTED:
            course.count_eviction()
            if not may_repeat or course.evictions > self.settings.eviction_retries:
                break
            try:
                outcome = await self._admit_and_run(course, call, resolved, rights)
            except BusError:  # it cannot: then it was ended, and that is all
                break
        else:
            return outcome
        course.retry_after_s = self.scheduler.retry_after_s()
        return outcome

    def _need(self, key: str, manifest: Manifest, capability: Capability, phase: Phase, profile: MemoryProfile) -> Need:
        """What the call takes of memory: nothing of ours where another's service does the work."""
        if self.settings.admission == "slots" or is_external(manifest, capability):
            return NO_NEED
        room_mb = self.scheduler.room_mb
        if capability.runner == "http":
            return self.needs.of(key, profile, room_mb=room_mb, shared=shared_by(manifest.name))
        if manifest.mode == "worker":
            shared, processes = shared_by(manifest.name, phase), manifest.workers.count
            return self.needs.of(key, profile, room_mb=room_mb, shared=shared, processes=processes)
        return self.needs.of(key, profile, room_mb=room_mb)

    def _tell(self, call: Invocation, capability: Capability, profile: MemoryProfile, run_id: str) -> Told:
        """What the overlay is told; a replay tells it what it was told the first time, so that it degrades alike."""
        if call.replay_of:
            return call.replay_of.told
        memory = memory_block(
            profile,
            self.stress.value,
            all_steps=self.settings.degrade == "all",
            degradation=capability.degradation,
            total_mb=self.stress.total_mb,
        )
        return Told(call.request_id, run_id, call.timestamp_ms, self.ledger.size, self.environment_hash, memory)

    def _job(self, call: Invocation, resolved: Resolved, told: Told, rights: Rights, ticket: Ticket) -> Job:
        manifest, capability = resolved.manifest, resolved.capability
        deadline = ticket.wish.deadline
        deadline_ms = now_ms() + int((deadline - time.monotonic()) * 1000)
        self._served.add(manifest.name)
        return Job(
            request_id=told.request_id,
            overlay=manifest.name,
            capability=capability.name,
            phase=call.phase,
            folder=manifest.folder,
            target=self.targets.of(resolved, call.payload),
            envelope=envelopes.overlay_request(call, manifest, capability, told, deadline_ms=deadline_ms),
            rights=rights,
            deadline=deadline,
            hard_mb=told.memory["hard_mb"],
            max_output_bytes=self.settings.max_output_bytes,
            edition=resolved.edition,
            limit=call.received + capability.timeout_s,
            meter=ticket.meter,
            tier=told.memory.get("offload_tier") or told.memory["tier"],
        )

    async def _judge(self, course: Course, resolved: Resolved, outcome: Outcome) -> Outcome:
        """Open the reply, and hold the result to the canonical form and to the capability's output schema."""
        schema = resolved.capability.output_schema
        validator = None if schema is None else self._validator(resolved, "output", schema)
        outcome = envelopes.open_reply(self._cut_off(outcome))
        if outcome.output_bytes > LARGE_BYTES:
            outcome, result_json = await asyncio.to_thread(envelopes.check_result, validator, outcome)
        else:
            outcome, result_json = envelopes.check_result(validator, outcome)
        course.keep_result(result_json)
        return outcome

    def _sandbox_of(self, outcome: Outcome) -> Mapping[str, Any]:
        """What held the call, as a record has it."""
        held = outcome.sandbox or Sandbox()
        found = self._sandboxes.get(held)
        if found is None:
            found = self._sandboxes[held] = {
                "mode": self.settings.sandbox,
                "scope": held.scope,
                "enforced": list(held.enforced),
                "missing": list(held.missing),
            }
        return found

    def _cut_off(self, outcome: Outcome) -> Outcome:
        """A call that was ended because the bus shuts down is told so; its caller may still be there."""
        if outcome.code != Code.CANCELLED or not self.is_closing:
            return outcome
        return outcome._replace(code="ERR_SHUTTING_DOWN", error="the bus shut down before the call ended")

    async def _finish(self, course: Course, outcome: Outcome) -> Answer:
        """Write the line, tell the plugins, and only then answer."""
        outcome = self._redacted(outcome)
        try:
            try:
                line = self._submit(course, outcome)
            except (TypeError, ValueError) as error:
                log.exception("the outcome of call %s cannot be written", course.request_id)
                outcome = course.refuse(BusError("ERR_INTERNAL", f"what came of the call is no JSON: {error}"))
                line = self._submit(course, outcome)
            receipt = await line.written
        except LedgerError as error:
            return course.unrecorded_answer(outcome, error)
        return line.answer or course.answer(outcome, line.record, receipt)

    def _redacted(self, outcome: Outcome) -> Outcome:
        """Without the secrets that an overlay may have said."""
        if not (outcome.error or outcome.log):
            return outcome
        redact = self.secrets.redact
        code = outcome.code if redact(outcome.code) == outcome.code else Code.FAILED  # an overlay's own may say one
        return outcome._replace(code=code, error=outcome.error and redact(outcome.error), log=redact(outcome.log))

    def _submit(self, course: Course, outcome: Outcome) -> _Line:
        """The record on its way into the ledger. Once it is there the plugins are told, whoever still waits for it.

        Raises `LedgerError`; `TypeError` or `ValueError` for what no line can hold, as a plugin's runner may give it.
        """
        record = course.record(outcome, self.environment_hash)
        if stores_payload(self.settings):
            record |= course.stored(outcome, self.secrets.redactor)
        line = _Line(course, outcome, record)
        line.written = self.ledger.submit(record, placed=line.prepare, written=partial(self._tell_plugins, record))
        return line

    def _tell_plugins(self, record: Record, receipt: Receipt) -> None:
        record |= {"seq": receipt.seq, "hash": receipt.hash}
        self.starts.end(record["request_id"])
        self.plugins.finished(record)

    async def _finish_alone(self, course: Course, outcome: Outcome) -> None:
        """Finish a call whose caller has gone; a second cancellation does not keep its line from being written."""
        task = asyncio.create_task(self._finish(course, outcome), name=f"finish {course.request_id}")
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        await asyncio.shield(task)

    def _validator(self, resolved: Resolved, side: str, schema: Mapping[str, Any]) -> Draft202012Validator:
        key = (resolved.manifest.manifest_hash, resolved.capability.name, side)
        found = self._validators.get(key)
        if found is None:
            if len(self._validators) >= VALIDATORS_KEPT:  # overlays that are edited all day
                self._validators.clear()
            found = self._validators[key] = schemas.compiled(schema)
        return found


def _require_name(caller: Caller | None, manifest: Manifest) -> None:
    """Raises `DeniedError` where an overlay wants to know who calls. The operator need not be told apart."""
    if manifest.requires_auth and caller is not None and caller.name is None:
        raise DeniedError("ERR_CALLER_UNKNOWN", f"{manifest.name} takes calls from known callers only")
