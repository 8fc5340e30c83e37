"""The bus itself. `Bus.invoke` is the story of one call, from the request to the line in the ledger.

A refusal on the way is a `BusError`, and whatever a started overlay does is an `Outcome`; `invoke` makes both into a
ledger line and an `Answer`, and the answer leaves only after its line is in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import orjson

from bus import envelopes, policy, runes, schemas
from bus.canonical import figure
from bus.course import Course
from bus.errors import BusError, OperatorError
from bus.ledger import Ledger, LedgerError
from bus.model import Told, now_ms
from bus.overlays import Registry
from bus.plugins import Plugins
from bus.records import collect_environment, environment_hash
from bus.scheduler import Scheduler, memory_block
from bus.settings import stores_payload
from bus.stress import StressMonitor
from runners.base import LARGE_BYTES, Code, HttpTarget, Job, Outcome, ProcessTarget, ServiceTarget

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    from jsonschema import Draft202012Validator

    from bus.course import Answer
    from bus.ledger import Receipt
    from bus.model import Capability, Invocation, Manifest, Record, Service
    from bus.overlays import Resolved
    from bus.runes import MemoryProfile
    from bus.settings import Settings
    from runners.base import Rights, Runner

_Key = TypeVar("_Key")
_Found = TypeVar("_Found")

log = logging.getLogger(__name__)

VALIDATORS_KEPT = 1024
LAST_LINES_S = 5.0
"""How long closing waits for the lines of calls that were ended."""
_WITHDRAWN = frozenset({"ERR_UNKNOWN_OVERLAY", "ERR_OVERLAY_DISABLED"})
_ENV_ALLOWED = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER")


@dataclass(frozen=True, slots=True)
class _Means:
    """What the calls of one edition of an overlay share.

    `env` is that of its programs, empty where it has none; `state` the folder for their state, with a `/` behind it, so
    that nothing else can be there; `targets` is where each capability's calls go.
    """

    edition: int
    env: Mapping[str, str] = field(default_factory=dict)
    state: str | None = None
    targets: dict[str, ProcessTarget | HttpTarget] = field(default_factory=dict)


class _ThisTurn(dict[_Key, _Found]):
    """What a look at the disk has found, kept for one turn of the event loop.

    Whatever is asked for in that turn arrived before it began, and so before the look.
    """

    def keep(self, key: _Key, found: _Found) -> _Found:
        if not self:
            asyncio.get_running_loop().call_soon(self.clear)
        self[key] = found
        return found


@dataclass(slots=True)
class _Line:
    """A record on its way into the ledger, and its answer, made while the disk is waited for."""

    course: Course
    outcome: Outcome
    record: Record
    answer: Answer | None = None
    written: asyncio.Future[Receipt] = field(init=False)

    def prepare(self, receipt: Receipt) -> None:
        with contextlib.suppress(Exception):  # who makes it then is told what is wrong
            self.answer = self.course.answer(self.outcome, self.record, receipt)


class Bus:
    """Owns the registry, the scheduler, the ledger, the plugins and their runners. One event loop, one Bus."""

    def __init__(self, settings: Settings, *, plugins: Iterable[object] = ()) -> None:
        self.settings = settings
        self.plugins = Plugins(settings, plugins)
        self.runners = self.plugins.runners()
        self.registry = Registry(
            settings.overlays,
            settings.state,
            check=self.plugins.check_overlay,
            default_timeout_s=settings.timeout_s,
            runners=self.runners.keys(),
        )
        self.stress = StressMonitor(self.plugins.stress_sources())
        self.scheduler = Scheduler(
            slots=settings.slots, queue_limit=settings.queue_limit, stress=lambda: self.stress.value
        )
        self.environment = collect_environment(settings.overlays.parent)
        self.environment_hash = environment_hash(self.environment)
        self.ledger = Ledger(
            settings.ledger,
            fsync=settings.fsync,
            environment=self.environment,
            more=lambda: self.scheduler.running > 0,
        )
        self._resolved: _ThisTurn[tuple[str, str | None], Resolved] = _ThisTurn()
        self._sound: _ThisTurn[str, _Means] = _ThisTurn()
        self._means: dict[str, _Means] = {}
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

        Raises `SettingError` where the list of disabled overlays cannot be read.
        """
        if self.is_started:
            return
        self.registry.load()
        self.ledger.open()
        self.stress.prime()
        if watch:
            self._tasks = [
                asyncio.create_task(self.registry.watch(on_look=self._forget_all_but), name="watch overlays"),
                asyncio.create_task(self.stress.run(self.settings.stress_period_s), name="sample stress"),
            ]
        self.is_started = True

    async def drain(self) -> None:
        """Refuse what comes, let what runs finish within `drain_s`, end the rest. Refusals still leave their lines."""
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
        try:
            await runner.close(at_once=self._at_once)
        except Exception:  # a plugin's; the other runners have to end, too
            log.exception("the runner %s could not be closed", runner.name)

    async def close(self) -> None:
        """Drain, and write the last lines. A Bus is not started again."""
        try:
            await self.drain()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, *self._finishing, return_exceptions=True)
            await asyncio.to_thread(self.ledger.close)

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

    async def invoke(self, call: Invocation) -> Answer:
        """Make one call. Raises nothing but `asyncio.CancelledError`, and that leaves its line too."""
        course = Course.of_call(call)
        try:
            resolved = course.resolved = self._resolve(call)
            course.run_id = envelopes.run_id(resolved.manifest, resolved.capability, call)
            rights = policy.authorize(resolved.manifest, resolved.capability, call.phase, call.payload, call.caller)
            self.plugins.authorize(call, resolved.manifest)
            await self._check_input(resolved, call)
            self._require_ledger()
            outcome = await self._admit_and_run(course, call, resolved, rights)
        except BusError as refusal:
            outcome = course.refuse(refusal)
        except asyncio.CancelledError:
            await self._finish_alone(course, self._cut_off(Outcome(Code.CANCELLED, error="the caller went away")))
            raise
        except Exception as error:
            log.exception("call %s failed inside the bus", call.request_id)
            outcome = course.refuse(BusError("ERR_INTERNAL", f"{type(error).__name__} in the bus"))
        return await self._finish(course, outcome)

    async def refuse(self, error: BusError, overlay: str, capability: str | None = None) -> Answer:
        """Answer a request that could not be read as an invocation, and write it down."""
        course = Course.of_request(overlay, capability)
        return await self._finish(course, course.refuse(error))

    def _resolve(self, call: Invocation) -> Resolved:
        """What the call goes to. An overlay that is no longer offered keeps nothing. Raises as `Registry.resolve`."""
        target = (call.overlay, call.capability)
        try:
            return self._resolved.get(target) or self._resolved.keep(target, self.registry.resolve(*target))
        except BusError as refusal:
            if refusal.code in _WITHDRAWN:  # the watch tells of it, too, where there is one
                self._forget(call.overlay.partition(".")[0])
            raise

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
        self._means.pop(name, None)
        for runner in self.runners.values():
            try:
                runner.forget(name)
            except Exception:  # a plugin's; the other runners have to hear of it
                log.exception("the runner %s failed to forget the overlay %s", runner.name, name)

    async def _check_input(self, resolved: Resolved, call: Invocation) -> None:
        if resolved.capability.input_schema is None:
            return
        validator = self._validator(resolved, "input", resolved.capability.input_schema)
        if len(call.payload_json) > LARGE_BYTES:
            await asyncio.to_thread(envelopes.check_input, resolved.capability, validator, call.payload)
        else:
            envelopes.check_input(resolved.capability, validator, call.payload)

    def _require_ledger(self) -> None:
        """What cannot be written down does not start. The refusal's own line is the next try to write."""
        if not self.ledger.healthy:
            raise LedgerError(self.ledger.reason or "the ledger is not open", self.ledger.hint)

    async def _admit_and_run(self, course: Course, call: Invocation, resolved: Resolved, rights: Rights) -> Outcome:
        """Wait for room, then run. Waiting counts against the deadline, which a caller may only bring nearer."""
        manifest, capability = resolved.manifest, resolved.capability
        profile = runes.resolve(call.profile) if call.profile else capability.memory
        course.timeout_ms = min(max(1, round(capability.timeout_s * 1000)), call.timeout_ms or sys.maxsize)
        deadline = call.received + course.timeout_ms / 1000
        async with self.scheduler.admit(
            f"{manifest.name}.{capability.name}", profile.priority, deadline, capability.concurrency
        ) as grant:
            course.queue_ms = figure(grant.queued_s * 1000)
            told = course.told = self._tell(call, capability, profile, str(course.run_id))
            outcome = await self.runners[capability.runner].run(self._job(call, resolved, told, rights, deadline))
            return await self._judge(course, resolved, outcome)  # within the slot: closing waits for slots

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

    def _job(self, call: Invocation, resolved: Resolved, told: Told, rights: Rights, deadline: float) -> Job:
        manifest, capability = resolved.manifest, resolved.capability
        deadline_ms = now_ms() + int((deadline - time.monotonic()) * 1000)
        self._served.add(manifest.name)
        return Job(
            request_id=told.request_id,
            overlay=manifest.name,
            capability=capability.name,
            phase=call.phase,
            folder=manifest.folder,
            target=self._target(resolved, call),
            envelope=envelopes.overlay_request(call, manifest, capability, told, deadline_ms=deadline_ms),
            rights=rights,
            deadline=deadline,
            hard_mb=told.memory["hard_mb"],
            max_output_bytes=self.settings.max_output_bytes,
            edition=resolved.edition,
            limit=call.received + capability.timeout_s,
        )

    def _target(self, resolved: Resolved, call: Invocation) -> ProcessTarget | HttpTarget:
        """Where the call goes, made once for each edition; only what a GET asks for is the call's own."""
        means, capability = self._means_of(resolved), resolved.capability
        target = means.targets.get(capability.name)
        if target is None:
            target = means.targets[capability.name] = _target_of(resolved.manifest, capability, means.env)
        if capability.method == "GET" and isinstance(target, HttpTarget):
            return dataclasses.replace(target, query=_query(call.payload))
        return target

    def _means_of(self, resolved: Resolved) -> _Means:
        """What the calls of this edition have in common. It has a folder for its state, whoever removed that."""
        name = resolved.manifest.name
        means = self._sound.get(name)
        if means is not None and means.edition == resolved.edition:
            return means
        means = self._means.get(name)
        if means is not None and means.edition == resolved.edition:
            if means.state is None or os.access(means.state, os.F_OK):
                return self._sound.keep(name, means)
            self.registry.renew(name)  # what keeps running has open what was removed
        fresh = _Means(resolved.edition)
        if _starts_programs(resolved.manifest):
            env = child_env(resolved.manifest, self.settings)
            fresh = _Means(resolved.edition, env, env["OVERLAY_STATE"] + "/")
        if means is None or means.edition <= resolved.edition:  # else it is a late call's
            self._means[name] = fresh
        return fresh

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

    def _cut_off(self, outcome: Outcome) -> Outcome:
        """A call that was ended because the bus shuts down is told so; its caller may still be there."""
        if outcome.code != Code.CANCELLED or not self.is_closing:
            return outcome
        return outcome._replace(code="ERR_SHUTTING_DOWN", error="the bus shut down before the call ended")

    async def _finish(self, course: Course, outcome: Outcome) -> Answer:
        """Write the line, tell the plugins, and only then answer."""
        try:
            try:
                line = self._submit(course, outcome)
            except ValueError as error:
                log.exception("the outcome of call %s cannot be written", course.request_id)
                outcome = course.refuse(BusError("ERR_INTERNAL", f"what came of the call is no JSON: {error}"))
                line = self._submit(course, outcome)
            receipt = await line.written
        except LedgerError as error:
            return course.unrecorded_answer(outcome, error)
        return line.answer or course.answer(outcome, line.record, receipt)

    def _submit(self, course: Course, outcome: Outcome) -> _Line:
        """The record on its way into the ledger. Once it is there the plugins are told, whoever still waits for it.

        Raises `LedgerError`, and `ValueError` for what no line can hold, as a plugin's runner may give it.
        """
        record = course.record(outcome, self.environment_hash, with_payload=stores_payload(self.settings))
        line = _Line(course, outcome, record)
        line.written = self.ledger.submit(record, placed=line.prepare, written=partial(self._tell_plugins, record))
        return line

    def _tell_plugins(self, record: Record, receipt: Receipt) -> None:
        record |= {"seq": receipt.seq, "hash": receipt.hash}
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


def _target_of(manifest: Manifest, capability: Capability, env: Mapping[str, str]) -> ProcessTarget | HttpTarget:
    if capability.argv:
        return ProcessTarget(capability.argv, env, manifest.stdin, manifest.mode, manifest.preload, manifest.workers)
    repeatable = capability.idempotent or manifest.deterministic
    service = None if manifest.service is None else _service_of(manifest.service, env)
    return HttpTarget(capability.url, capability.method, repeatable=repeatable, service=service)


def _service_of(service: Service, env: Mapping[str, str]) -> ServiceTarget:
    """The service that calls go to which the bus starts."""
    return ServiceTarget(service.argv, env, service.ready_path, service.start_timeout_s, service.idle_s, service.max_mb)


def _starts_programs(manifest: Manifest) -> bool:
    return manifest.service is not None or any(one.argv for one in manifest.capabilities.values())


def child_env(manifest: Manifest, settings: Settings) -> dict[str, str]:
    """An allow-list, never the bus's own environment; makes the overlay's state folder, or raises `OperatorError`.

    Python's hashes are fixed, so that a replay can match. A `.venv` of the overlay's own comes first on the PATH.
    """
    passed = (*_ENV_ALLOWED, *settings.pass_env_names, *manifest.env)
    env = {name: os.environ[name] for name in passed if name in os.environ and not name.startswith("AAL_")}
    env["PATH"] = f"{manifest.folder / '.venv' / 'bin'}:{env.get('PATH', os.defpath)}"
    state = settings.state / "state" / manifest.name
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError("ERR_FILES", f"cannot make the folder {state}: {error.strerror}") from error
    return env | {"PYTHONHASHSEED": "0", "OVERLAY_STATE": str(state)}


def _query(payload: Mapping[str, Any]) -> dict[str, str]:
    """The scalars of a payload, as the query of a GET."""
    return {
        name: value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in payload.items()
        if isinstance(value, str | int | float | bool)
    }
