"""A candidate version of an overlay, tried with recorded good calls before it takes the live one's place.

It is called through a Bus of its own, so that admission, rights and limits hold as ever, with a ledger, a state and a
folder of overlays of its own, which are removed at the end: the live bus's are only read. That folder has a link to the
candidate and no copy of it. So links that lead out of the candidate, what its `.venv` has, and its code hash are what
they will be in its place, whatever size it is; and what changes in it meanwhile is noticed by its code hash. Secrets
are those of the live bus: its file of them is linked, not copied.

Why a result drifted is found by two experiments. The candidate runs once more: two results that differ are nobody's
change. And where the live overlay still is what the record names, it runs too, in a second Bus of the same kind. A
call that needed consent to be run again is not run more often than was consented to: there the cause is what differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import uvloop

from bus import manifests, policy, provenance, secrets
from bus.codehash import TooLargeError, code_hash
from bus.dispatch import Bus
from bus.errors import BusError, OperatorError, ReplayError
from bus.hookspecs import hookimpl
from bus.model import Phase
from bus.plugins import confinement_of
from bus.records import collect_environment
from bus.replay import invocation_of, run_again, try_all
from runners.base import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from bus.drift import Control
    from bus.model import Manifest, Record
    from bus.replay import Replay, Trial
    from bus.settings import Settings


NOTHING_MORE = "nothing more was tried, as the call may change something"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is tried. The hashes are those of a record's members of the same name."""

    folder: Path
    overlay: str
    version: str
    manifest_hash: str
    code_hash: str

    def body(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "overlay": self.overlay,
            "version": self.version,
            "manifest_hash": self.manifest_hash,
            "code_hash": self.code_hash,
        }


def name_in(folder: Path) -> str | None:
    """The name that the folder's manifest gives its overlay; None where it gives none that can be. Raises `OSError`."""
    try:
        document = parse_json((folder / manifests.FILE).read_bytes())
    except JsonError:
        return None
    name = document.get("name") if isinstance(document, dict) else None
    return name if isinstance(name, str) and manifests.NAME.fullmatch(name) else None


def require_good(recorded: Record, overlay: str, *, live: bool) -> None:
    """Raise `ReplayError` for a record that no candidate for `overlay` is held to."""
    seq = recorded["seq"]
    call = invocation_of(recorded)
    if recorded["overlay"] != overlay:
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} is a call of {recorded['overlay']}")
    if not recorded["ok"]:
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} is no good call: it ended with {recorded['code']}")
    if not live and policy.replay_needs_consent(call.phase, deterministic=recorded["deterministic"] is True):
        detail = f"line {seq}: phase {call.phase} may write or exec, and {overlay} was not declared deterministic"
        raise ReplayError("ERR_NEEDS_LIVE", detail)


def try_candidate(
    settings: Settings,
    folder: Path,
    overlay: str,
    records: Iterable[Record],
    *,
    jobs: int,
    live: bool,
    begun: Callable[[Candidate], object],
    done: Callable[[Trial], object],
) -> None:
    """Try the candidate in `folder` with these records, `jobs` at once.

    `begun` is told what is tried, `done` of each trial as it ends. Raises `DeniedError` for a candidate that does not
    load, `BrokenLineError`, and `KeyboardInterrupt` once what was running has ended.
    """

    async def run() -> None:
        async with Gate(settings, folder, overlay, live=live) as gate:
            begun(gate.candidate)
            await try_all(records, gate.attempt, jobs=jobs, done=done)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


class Gate:
    """One candidate under trial. Use it in an `async with` block."""

    candidate: Candidate

    def __init__(self, settings: Settings, folder: Path, overlay: str, *, live: bool = False) -> None:
        self._settings = settings
        self._folder = folder
        self._overlay = overlay
        self._live = live
        self._stack = contextlib.AsyncExitStack()
        self._control_lock = asyncio.Lock()
        self._control_bus: Bus | None = None
        self._live_hashes: tuple[str, str] | None = None

    async def __aenter__(self) -> Self:
        """Raises `DeniedError` where the candidate is broken, `OperatorError` where its folders cannot be made."""
        async with contextlib.AsyncExitStack() as stack:
            self._bus = await stack.enter_async_context(_isolated(self._settings, self._folder, self._overlay))
            self.candidate = await asyncio.to_thread(self._look, self._bus.registry.entry(self._overlay).usable())
            self._live_hashes = await asyncio.to_thread(_hashes_of, self._settings.overlays / self._overlay)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def attempt(self, record: Record) -> Replay:
        """Try the candidate with the line of `record`, which is read again.

        FAILED is what the recorded overlay could answer and the candidate cannot. Raises as `bus.replay.replay`.
        """
        recorded = await asyncio.to_thread(provenance.read_line, self._settings.ledger, record["seq"])
        require_good(recorded, self._overlay, live=self._live)
        again = await self._run(self._bus, recorded)
        self._require_unchanged(again)
        if again.verdict != "DRIFT":
            return again
        if not again.answer.ok:
            return replace(again, verdict="FAILED", cause=None)
        return await self._judge(recorded, again)

    async def _judge(self, recorded: Record, again: Replay) -> Replay:
        """With the cause of its drift, found by experiments unless the call needed consent."""
        if self._needed_consent(recorded):
            return replace(again, cause=again.cause and replace(again.cause, why=f"{again.cause.why}; {NOTHING_MORE}"))
        second = await self._run(self._bus, recorded)
        repeats = None if second.verdict == "FAILED" else second.gives_as(again)
        control = await self._control(recorded, again) if repeats else None
        return again.judged(repeats=repeats, control=control)

    def _needed_consent(self, recorded: Record) -> bool:
        """By the word of the recorded version or of the candidate; one of them is enough, as to run it at all."""
        manifest = self._bus.registry.entry(self._overlay).usable()
        declared = recorded["deterministic"] is True and manifest.deterministic
        return policy.replay_needs_consent(Phase(recorded["phase"]), deterministic=declared)

    async def _control(self, recorded: Record, again: Replay) -> Control | None:
        """What the version that made the record gives now; None where it is not there any more, or is the candidate."""
        of_record = (recorded["manifest_hash"], recorded["code_hash"])
        of_candidate = (self.candidate.manifest_hash, self.candidate.code_hash)
        if self._live_hashes != of_record or of_candidate == of_record:
            return None
        try:
            beside = await self._run(await self._bus_of_live(), recorded)
        except BusError:
            return None
        ran = beside.answer.record
        if beside.verdict == "FAILED" or ran is None or (ran["manifest_hash"], ran["code_hash"]) != of_record:
            return None
        if beside.verdict == "MATCH":
            return "recorded"
        return "new" if beside.gives_as(again) else "another"

    async def _bus_of_live(self) -> Bus:
        async with self._control_lock:
            if self._control_bus is None:
                live = self._settings.overlays / self._overlay
                self._control_bus = await self._stack.enter_async_context(
                    _isolated(self._settings, live, self._overlay)
                )
            return self._control_bus

    async def _run(self, bus: Bus, recorded: Record) -> Replay:
        """Without a place in a ledger, since that goes with its bus."""
        again = await run_again(bus, recorded, live=self._live)
        body = again.answer.body | {"provenance": None}
        return replace(again, answer=again.answer._replace(body=body))

    def _look(self, manifest: Manifest) -> Candidate:
        try:
            code = code_hash(self._folder)
        except (OSError, TooLargeError) as error:
            raise OperatorError("ERR_FILES", f"cannot read {self._folder}: {error}") from None
        return Candidate(self._folder, self._overlay, manifest.version, manifest.manifest_hash, code)

    def _require_unchanged(self, again: Replay) -> None:
        ran = again.answer.record
        if ran is not None and ran["code_hash"] not in (None, self.candidate.code_hash):
            detail = f"{self._folder} changed while it was tried"
            raise OperatorError("ERR_FILES", detail, hint="Let it rest, and try it again.")


class _KeepOut:
    """A plugin: no right that a manifest asks for reaches what the live bus has, the live overlay's state included."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._kept = confinement_of(settings).kept_from((folder.resolve(),))

    @hookimpl
    def aal_check_overlay(self, manifest: Manifest) -> Iterator[str]:
        for offered in manifest.capabilities.values():
            for path in (*offered.read_paths, *offered.write_paths):
                if self._kept.is_reached_by(Path(path)):
                    yield f"a right of {offered.name} to {path}, where the live bus keeps what is its own"


@contextlib.asynccontextmanager
async def _isolated(settings: Settings, folder: Path, overlay: str) -> AsyncIterator[Bus]:
    """A Bus that has one overlay, and folders of its own for all that it writes."""
    with tempfile.TemporaryDirectory(prefix="aal-gate-", ignore_cleanup_errors=True) as root:
        own = _own_settings(settings, Path(root), folder, overlay)
        environment = await asyncio.to_thread(collect_environment, settings.overlays.parent)
        bus = Bus(own, plugins=[_KeepOut(settings, folder)], environment=environment)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(bus.close)
            await bus.start(watch=False)
            yield bus


def _own_settings(settings: Settings, root: Path, folder: Path, overlay: str) -> Settings:
    """Makes the folders of a Bus within `root`: one with a link to the overlay, one with a link to the secrets."""
    root = root.resolve()
    own = replace(settings, overlays=root / "overlays", logs=root / "logs", state=root / "state", fsync="never")
    for made in (own.overlays, own.state):
        made.mkdir()
    (own.overlays / overlay).symlink_to(folder.resolve(), target_is_directory=True)
    (own.state / secrets.FILE).symlink_to((settings.state / secrets.FILE).absolute())
    return own


def _hashes_of(folder: Path) -> tuple[str, str] | None:
    """The manifest's and the code's; None where the folder cannot be read."""
    try:
        text = (folder / manifests.FILE).read_bytes()
        return hashlib.sha256(text).hexdigest(), code_hash(folder)
    except (OSError, TooLargeError):
        return None
