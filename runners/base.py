"""The ground floor: what a runner is given, what it gives back, and how JSON text is read.

An overlay's failure is a value here. Whatever a started process or a called service does (crash, flood, hang, lie),
`Runner.run` returns an `Outcome` with a code; only cancellation passes through, after everything started was killed.
"""

from __future__ import annotations

import asyncio
import enum
import json
import math
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

_BOM = b"\xef\xbb\xbf"
_SHOWN = 80
MAX_DEPTH = 64
"""How many objects and arrays JSON may nest. Deeper text is refused before anything walks it."""


GROWN = 1.125
"""How many times as much memory as ever before a job must have to count as having grown."""

LARGE_BYTES = 256 * 1024
"""JSON text above this is read and walked in a thread, so that other calls go on meanwhile."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Of this thread; None where it runs none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Code(enum.StrEnum):
    """The codes of what can go wrong at an overlay. `schemas/error_catalog.json` explains each."""

    OK = "OK"
    FAILED = "ERR_OVERLAY_FAILED"
    START = "ERR_OVERLAY_START"
    CRASH = "ERR_OVERLAY_CRASH"
    PROTOCOL = "ERR_OVERLAY_PROTOCOL"
    OUTPUT_TOO_LARGE = "ERR_OUTPUT_TOO_LARGE"
    TIMEOUT = "ERR_TIMEOUT"
    CANCELLED = "ERR_CANCELLED"
    UNREACHABLE = "ERR_HTTP_UNREACHABLE"
    HTTP_STATUS = "ERR_HTTP_STATUS"
    CIRCUIT_OPEN = "ERR_CIRCUIT_OPEN"
    MEMORY_LIMIT = "ERR_MEMORY_LIMIT"
    EVICTED = "ERR_EVICTED"
    PROCESS_LIMIT = "ERR_PROCESS_LIMIT"
    SCRATCH_LIMIT = "ERR_SCRATCH_LIMIT"
    SANDBOX = "ERR_SANDBOX"


Tier = Literal["LOCAL", "EXTENDED", "COLD"]
"""A kind of place for scratch: memory, a disk, a slower one."""

TIERS: tuple[Tier, ...] = get_args(Tier)

SandboxMode = Literal["enforce", "best-effort", "off"]
"""What becomes of a call that the kernel cannot hold to all of its rights: it is refused, it runs, nothing is held."""


class Rights(NamedTuple):
    """What the kernel lets the processes of a call do.

    `network` is True for any, or the TCP ports that may be connected to. `exec` is whether other programs may be
    executed. `read_paths` and `write_paths` are absolute paths beyond the built-in ones. `gpu` is whether the device
    nodes of graphics processors may be used. `own_paths` are the `write_paths` of all calls of the overlay: what lies
    there it may have laid in another call, so no link or file there says what this one may read.
    """

    write: bool = False
    network: bool | tuple[int, ...] = False
    exec: bool = False
    read_paths: tuple[str, ...] = ()
    write_paths: tuple[str, ...] = ()
    gpu: bool = False
    own_paths: tuple[str, ...] = ()


class Sandbox(NamedTuple):
    """What the kernel held the process to that ran a call.

    `scope` is how many calls it was made for: the call's own, those of a pool of workers, all of a service; `none`
    where it is not the bus's process. `enforced` names rights (read, write, network, exec, processes, system, limits);
    `missing` has those that were not held or not wholly, each as `right: why`.
    """

    scope: Literal["call", "pool", "service", "none"] = "none"
    enforced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


Mode = Literal["auto", "spawn", "fork", "worker"]
"""How a call gets its process. `auto` is `fork` where the command is a Python script, else `spawn`."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The pool of an overlay in mode `worker`: `count` processes, each replaced after `max_calls` calls.

    So is one that uses more memory than `max_mb`, with all that it started, also during a call; None takes the largest
    HARD of the calls so far. From its start a worker has `start_timeout_s` for its first reply, whoever still waits.
    Its scratch folder is of `tier` as long as it runs, whatever its calls are of. `purge` is whether it reads the line
    `PURGE` between two calls, which it must not answer.
    """

    count: int = 1
    max_calls: int = 10_000
    max_mb: int | None = None
    start_timeout_s: float = 30.0
    tier: Tier = "LOCAL"
    purge: bool = False


PURGE = b'{"event":"purge"}'
"""What a worker reads as a line, and a service as a body: let go of what is kept in memory and can be had again."""


@dataclass(frozen=True, slots=True)
class ProcessTarget:
    """A program to start. `argv[0]` is looked up on the PATH of `env`; `stdin="file"` gives the envelope as a memfd.

    `preload` names modules that a `fork` loads before the calls, beside those that the script is seen to import.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: Literal["file", "pipe"] = "file"
    mode: Mode = "auto"
    preload: tuple[str, ...] = ()
    workers: Workers = Workers()


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """An HTTP service that the bus starts, with its port in `OVERLAY_PORT` and for `{port}` in the command.

    It is ready once a GET of `ready_path` answers 2xx (None: once it listens), for which it has `start_timeout_s`. It
    is stopped after `idle_s` without a call, and ended where it uses more memory than `max_mb`.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready_path: str | None = None
    start_timeout_s: float = 30.0
    idle_s: float = 300.0
    max_mb: int | None = None
    rights: Rights = field(default_factory=Rights)
    """The union of those of all the phases that the overlay serves, since one process answers in each."""
    tier: Tier = "LOCAL"
    """Of its scratch folder, as long as it runs."""


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """A service to call. GET sends `query` and no body; every other method sends the envelope as its JSON body.

    Of a `service` that the bus starts, `url` is the path alone: the port is known once it runs. So is `purge_url`,
    where the service takes a POST of `PURGE`; None where it takes none.
    """

    url: str
    method: str = "POST"
    query: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    """True where sending twice does no harm (idempotent or deterministic capability)."""
    service: ServiceTarget | None = None
    purge_url: str | None = None


class Share(NamedTuple):
    """What processes that calls have in common have now: how many there are, and their memory in MiB."""

    processes: int
    used_mb: float


HELPERS = ""
"""The name of the share that helpers have, which are processes of no overlay's calls."""


def shared_by(overlay: str, phase: str = "") -> str:
    """What the calls of an overlay have in common: the workers of a phase, or its service."""
    return f"{overlay} {phase}".rstrip()


def _nobody(_more_mb: float) -> None:
    """Hears of what a job has of memory."""


class Meter:
    """What the processes of one job have of memory, as far as anybody has looked; and how to end them for others' sake.

    `used_mb` is what they had at the last look, `peak_mb` the most of all looks, in MiB, 0 until the first. `grown_at`
    is when that was last a good deal more than before, on its clock, and `paused_s` for how long it had not been at
    most, before it was again; from the start on, which `begin` tells. No more is believed than `most_mb`: who looks may
    be a process of the overlay's own. `on_use` is told of each change, until `end`. `evict` is set
    by a runner while it can end the job with `Code.EVICTED`, and says why in words that go on from "was ended".
    """

    __slots__ = ("_clock", "_most_mb", "_on_use", "evict", "grown_at", "paused_s", "peak_mb", "used_mb")

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_use: Callable[[float], None] = _nobody,
        most_mb: float = math.inf,
    ) -> None:
        self._clock = clock
        self._on_use = on_use
        self._most_mb = most_mb
        self.used_mb = 0.0
        self.peak_mb = 0.0
        self.grown_at = 0.0
        self.paused_s = 0.0
        self.evict: Callable[[str], None] | None = None

    def begin(self, now: float) -> None:
        """They are about to be started."""
        self.grown_at = now

    @property
    def quiet_s(self) -> float:
        """For how long they have not grown by now."""
        return self._clock() - self.grown_at

    def see(self, mb: float) -> None:
        """They have so much now."""
        mb = min(mb, self._most_mb)
        more_mb, self.used_mb = mb - self.used_mb, mb
        if mb > GROWN * self.peak_mb:
            now = self._clock()
            self.paused_s = max(self.paused_s, now - self.grown_at)
            self.grown_at = now
        self.peak_mb = max(self.peak_mb, mb)
        self._on_use(more_mb)

    def end(self) -> None:
        """Nobody needs to know any more."""
        self.evict = None
        self._on_use = _nobody


class Job(NamedTuple):
    """An admitted invocation, as a runner gets it. `deadline` and `limit` are seconds on the `time.monotonic` clock.

    `limit` is the deadline that the overlay's own timeout gives; the caller may have brought `deadline` nearer.
    `edition` counts what its overlay has been: code, manifest and folder. A higher number is a later one. What keeps
    running from call to call serves only jobs of the edition that it was started for. `meter` is kept up to date by a
    runner that can look at what it started for this job alone. `tier` is that of the scratch folder of what is started
    for this job.
    """

    request_id: str
    overlay: str
    capability: str
    phase: str
    folder: Path
    target: ProcessTarget | HttpTarget
    envelope: bytes
    rights: Rights
    deadline: float
    hard_mb: int
    max_output_bytes: int
    max_log_bytes: int = 64 * 1024
    edition: int = 0
    limit: float = 0.0
    meter: Meter | None = None
    tier: Tier = "LOCAL"


class Outcome(NamedTuple):
    """What came of a job.

    A runner leaves in `result` the JSON value that the overlay sent, not yet opened as a protocol reply. `exit_code` is
    negative for a signal, as in `subprocess`. `log` is the overlay's stderr (and noise before its reply), capped.
    """

    code: str = Code.OK
    result: Any = None
    error: str | None = None
    exit_code: int | None = None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    peak_floor_mb: float | None = None
    """What `peak_mb` would be of a program without any memory: the kernel counts what it shared when it was started."""
    log: str = ""
    output_bytes: int = 0
    replied: bool = False
    """True where `ok`, `code` and `error` are the overlay's own words, from a protocol reply."""
    retryable: bool | None = None
    """None where the error catalogue decides."""
    hint: str | None = None
    """What to do about it; None where the error catalogue decides."""
    cost_cents: float | None = None
    side_effects: tuple[Any, ...] = ()
    sandbox: Sandbox | None = None
    """What held the process that ran it; None where none was started."""

    @property
    def ok(self) -> bool:
        return self.code == Code.OK

    @property
    def status(self) -> Literal["success", "failure", "partial"]:
        """`partial`: it failed, and yet left a result."""
        if self.ok:
            return "success"
        return "failure" if self.result is None else "partial"


class Runner(Protocol):
    """One way to carry a job to an overlay. The name is what manifests call it by: `proc` or `http`."""

    name: str

    async def run(self, job: Job) -> Outcome:
        """Run to the end or to `job.deadline`.

        Raises nothing but `asyncio.CancelledError`, and that only after all that it started for this job has ended.
        """

    def state(self, overlay: str) -> dict[str, Any]:
        """What it keeps for an overlay from call to call, as JSON for people; empty where nothing."""

    def shares(self) -> dict[str, Share]:
        """The processes that it keeps for more than one call, by what `shared_by` gives for them, and its helpers."""

    def relieve(self, idle_s: float) -> None:
        """Memory is short: end what is kept and was without a call for so many seconds."""

    def purge(self, overlays: Collection[str] | None) -> dict[str, int]:
        """Have what is kept for these overlays, or for all (None), let go of its caches, where its target takes that.

        Gives to how many processes or services of each overlay that is told: now, or once they have answered the call
        that they have. Waits for none of them.
        """

    def forget(self, overlay: str) -> None:
        """The overlay was removed or disabled: what is kept for it ends, each as soon as its calls have ended."""

    async def close(self, *, at_once: bool = False) -> None:
        """End all that still runs and let go of pooled resources; `at_once` without the grace that a TERM gives.

        A second call, while the first still waits, may bring the end nearer.
        """


class JsonError(ValueError):
    """Text that is not JSON as RFC 8259 has it, or that says one thing twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice[:_SHOWN]!r} stands twice in one object")
    return members


def _constant(name: str) -> Any:  # noqa: ANN401
    raise JsonError(f"{name} is not a JSON value")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


def parse_json(text: bytes) -> Any:  # noqa: ANN401
    """Read UTF-8 JSON text strictly: no NaN or Infinity, no duplicate keys, at most `MAX_DEPTH` levels.

    Raises `JsonError`, whose message says what and where.
    """
    value = _read_strictly(text) if len(text) > LARGE_BYTES else _read(text)
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _too_deep(value):
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _read(text: bytes) -> Any:  # noqa: ANN401
    """With orjson, where that says all, at half the cost; but it lets no other thread run meanwhile."""
    try:
        value = orjson.loads(text)
        return value if _says_all(value, text) else _read_strictly(text)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return _read_strictly(text)


def _says_all(value: Any, text: bytes) -> bool:  # noqa: ANN401
    """Whether orjson has read all of a text: of equal keys it keeps the last, of 20 digits a float.

    A string without escapes has two quotation marks: so what is missing shows by their number. Raises
    `orjson.JSONEncodeError` for what is nested too deep.
    """
    again = orjson.dumps(value)
    if again == text:
        return True
    return b"\\" not in text and again.count(b'"') == text.count(b'"') and not _LONG_NUMBER.search(text)


def _read_strictly(text: bytes) -> Any:  # noqa: ANN401
    """With Python's own decoder, which is asked about every object. Raises `JsonError`."""
    try:
        return _decoder.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        what = "a byte order mark" if text.startswith(_BOM) else error.msg.removesuffix(" at")
        raise JsonError(f"{what} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels") from None
    except JsonError:
        raise
    except ValueError:  # the limit of int(), whose message is for programmers of Python
        raise JsonError("a whole number has thousands of digits") from None


def _too_deep(value: Any) -> bool:  # noqa: ANN401
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
