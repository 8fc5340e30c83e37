"""The nouns that the bus passes around, each frozen. Nothing here reads a file or a clock but `new_request_id`."""

from __future__ import annotations

import enum
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runners.base import Workers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bus.runes import MemoryProfile
    from runners.base import Mode, Tier


class Phase(enum.StrEnum):
    """What a call is for. The table in `policy.py` says what each needs and may do."""

    OPEN = "OPEN"
    ALIGN = "ALIGN"
    ASCEND = "ASCEND"
    CLEAR = "CLEAR"
    SEAL = "SEAL"


class Permission(enum.StrEnum):
    """What an overlay may ask for at all."""

    ANALYSIS = "analysis"
    EXEC = "exec"


@dataclass(frozen=True, slots=True)
class Degradation:
    """What a manifest adds when its rune's degradation applies."""

    max_fraction: float | None = None
    disable_nonessential: bool = False


@dataclass(frozen=True, slots=True)
class Capability:
    """One callable thing. Exactly one of `argv` (runner `proc`) and `url` (runner `http`) is set."""

    name: str
    runner: str
    timeout_s: float
    phases: tuple[Phase, ...]
    memory: MemoryProfile
    description: str = ""
    argv: tuple[str, ...] = ()
    url: str = ""
    method: str = "POST"
    input_schema: Mapping[str, Any] | None = None
    output_schema: Mapping[str, Any] | None = None
    degradation: Degradation = Degradation()
    concurrency: int | None = None
    cost_cents: float = 0.0
    idempotent: bool = False
    read_paths: tuple[str, ...] = ()
    write_paths: tuple[str, ...] = ()
    network: bool | tuple[int, ...] = True


@dataclass(frozen=True, slots=True)
class Service:
    """An HTTP service that the bus starts for an overlay; as `runners.base.ServiceTarget`, without its environment."""

    argv: tuple[str, ...]
    ready_path: str | None = None
    start_timeout_s: float = 30.0
    idle_s: float = 300.0
    max_mb: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """An overlay as the rest of the code sees it, whichever shape its manifest had.

    `folder` is resolved. `manifest_hash` is the SHA-256 of the file's bytes. `op_policy` maps an `op` of the payload to
    the permissions it needs; None where the manifest has none. `service` is set where the bus starts the HTTP service:
    then the `url` of a capability is the path alone, from its `/` on. `warnings` are for people. `own_paths` are the
    `write_paths` of all capabilities. `purge_url` is where its service takes a purge, as the `url` of a capability.
    """

    name: str
    version: str
    shape: Literal["A", "B", "native"]
    folder: Path
    manifest_hash: str
    phases: tuple[Phase, ...]
    permissions: frozenset[Permission]
    capabilities: Mapping[str, Capability]
    description: str = ""
    status: str = "active"
    op_policy: Mapping[str, tuple[str, ...]] | None = None
    deterministic: bool = False
    cacheable: bool = False
    requires_auth: bool = False
    env: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    stdin: Literal["file", "pipe"] = "file"
    mode: Mode = "auto"
    preload: tuple[str, ...] = ()
    workers: Workers = field(default_factory=Workers)
    service: Service | None = None
    purge_url: str | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    own_paths: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        written = dict.fromkeys(path for offered in self.capabilities.values() for path in offered.write_paths)
        object.__setattr__(self, "own_paths", tuple(written))  # once, not in each call

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Those of the scratch folders of its calls, as long as none is offloaded: of all capabilities, once each."""
        return tuple(dict.fromkeys(capability.memory.tier for capability in self.capabilities.values()))

    @property
    def resident_tier(self) -> Tier:
        """Of a process that answers call after call: that of all capabilities, and LOCAL where they differ."""
        tiers = self.tiers
        return tiers[0] if len(tiers) == 1 else "LOCAL"

    @property
    def has_program(self) -> bool:
        """Whether a call of it may start one."""
        return any(capability.argv for capability in self.capabilities.values())

    @property
    def starts_programs(self) -> bool:
        """Whether the bus starts anything for it; else it is a service of somebody else's."""
        return self.has_program or self.service is not None

    @property
    def takes_purges(self) -> bool:
        """Whether its workers or its service can be told to let go of their caches; `purges` says when they are."""
        return self.purge_url is not None or (self.mode == "worker" and self.workers.purge)

    @property
    def prefers_gpu(self) -> bool:
        return self.resources.get("prefers_gpu") is True


class Told(NamedTuple):
    """What an overlay is told of its call beside the payload. `memory` is the envelope's memory block."""

    request_id: str
    run_id: str
    timestamp_ms: int
    prev_size: int
    environment_hash: str
    memory: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReplayOf:
    """The line that a replay runs again, and what its overlay was told, so that it is told the same."""

    seq: int
    told: Told


class Invocation(NamedTuple):
    """One request, read and checked for form.

    `received` and the deadline made from it are seconds on the `time.monotonic` clock. `capability` is None where the
    caller named none. `payload_json` is the payload's canonical form (RFC 8785). `seed` takes the place of the request
    id in the run id.
    """

    request_id: str
    timestamp_ms: int
    received: float
    overlay: str
    phase: Phase
    payload: Mapping[str, Any]
    payload_json: bytes
    capability: str | None = None
    profile: str | None = None
    seed: str | int | None = None
    session: str | None = None
    timeout_ms: int | None = None
    caller: str | None = None
    replay_of: ReplayOf | None = None


Record = dict[str, Any]
"""A line of the ledger, as `schemas/record.schema.json` has it; on its way there without what the ledger adds."""


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def new_request_id() -> str:
    """A UUIDv7 (RFC 9562 section 5.7): 48 bits of milliseconds, then randomness; sorts by time.

    It has to be unique, not secret, so it costs no system call.
    """
    high, low = random.getrandbits(12), random.getrandbits(62)
    text = f"{now_ms() << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
