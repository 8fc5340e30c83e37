"""What this machine holds processes to, found out by trying: a program of ours is run as an overlay, in each phase.

Everything that it tries something on is made for it in a folder that goes afterwards: a file and a folder that it has
no right to, sockets that listen, and this process itself for its signals.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runners.base import Job, ProcessTarget
from runners.confinement import MECHANISMS, OPEN_FILES, RIGHTS, Confinement, Right
from runners.helpers import Helpers
from runners.probe_rights import start_of
from runners.process import ProcessRunner
from runners.processes import Home
from runners.programs import elf_loader, real
from runners.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runners.base import Rights, Sandbox, SandboxMode
    from runners.confinement import Held

PROGRAM = Path(__file__).with_name("probe_rights.py")
TIMEOUT_S = 30.0
"""How long, in seconds, one trial may take, the start of its helper included."""

SCRATCH_MB = 16
_MB = 2**20
_OUTPUT_BYTES = 64 * 1024
_HARD_MB = 512
_PROCESSES = 64
_HOST = "127.0.0.1"
_NAME, _RUN = "trial", "run.py"


class Found(NamedTuple):
    """Of one right in one phase: whether the phase gives it, whether all else was refused, by what, and in words."""

    allowed: bool
    enforced: bool
    by: tuple[str, ...]
    found: str


Findings = dict[Right, Found]


class _Ground(NamedTuple):
    """What all trials share: the folder that everything of theirs is in, and what the program is told, as JSON."""

    runner: ProcessRunner
    confinement: Confinement
    base: Path
    envelope: bytes


async def find_out(phases: Mapping[str, Rights], mode: SandboxMode = "best-effort") -> dict[str, Findings]:
    """Try the rights of each phase. Raises OSError where the program cannot be run, with the reason."""
    with ExitStack() as stack:
        base = real(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aal-trial-"))))
        envelope = json.dumps(_lay_out(base, stack)).encode()
        confinement = Confinement(mode, Tiers.all_in(base / "scratch", SCRATCH_MB), _PROCESSES)
        runner = ProcessRunner(Helpers(most=1, confinement=confinement), kill_grace_s=0)
        ground = _Ground(runner, confinement, base, envelope)
        try:
            found = await asyncio.gather(*(_try_phase(ground, phase, rights) for phase, rights in phases.items()))
        finally:
            await runner.close(at_once=True)
        return dict(zip(phases, found, strict=True))


def _lay_out(base: Path, stack: ExitStack) -> dict[str, Any]:
    """What the program is told, made in `base`; the sockets close with `stack`."""
    for name in ("overlay", "state", "outside"):
        (base / name).mkdir()
    shutil.copyfile(PROGRAM, base / "overlay" / _RUN)
    (base / "outside/file").write_bytes(b"not to be read")
    program = shutil.which("true") or sys.executable
    return {
        "outside": str(base / "outside"),
        "tcp": _listening(stack, socket.SOCK_STREAM, (_HOST, 0))[1],
        "udp": _listening(stack, socket.SOCK_DGRAM, (_HOST, 0))[1],
        "unix": _listening(stack, socket.SOCK_STREAM, str(base / "outside/socket")),
        "program": program,
        "loader": str(elf_loader(Path(program)) or program),
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
        "files": OPEN_FILES,
        "bytes": SCRATCH_MB * _MB,
    }


def _listening(stack: ExitStack, kind: socket.SocketKind, address: Any) -> Any:  # noqa: ANN401
    """The address of a socket that can be reached there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    listener = stack.enter_context(socket.socket(family, kind))
    listener.bind(address)
    if kind == socket.SOCK_STREAM:
        listener.listen()
    return listener.getsockname()


async def _try_phase(ground: _Ground, phase: str, rights: Rights) -> Findings:
    env = {"PATH": os.defpath, "OVERLAY_STATE": str(ground.base / "state")}
    home = Home(_NAME, phase, rights, ground.base / "overlay", env, program=sys.executable)
    outcome = await ground.runner.run(_job(home, ground.envelope))
    if not outcome.ok or outcome.sandbox is None:
        raise OSError(errno.EIO, f"in phase {phase}: {outcome.error} {outcome.log}".strip())
    helpers = ground.runner.state(_NAME)["helpers"]
    namespace = any(helper["phase"] == phase and helper["pid_namespace"] for helper in helpers)
    held = ground.confinement.plan(home, forks=False).held(namespace=namespace, taken=MECHANISMS)
    return {right: _judge(right, rights, outcome.result[right], held[right], outcome.sandbox) for right in RIGHTS}


def _job(home: Home, envelope: bytes) -> Job:
    return Job(
        request_id=_NAME,
        overlay=_NAME,
        capability=_NAME,
        phase=home.phase,
        folder=home.folder,
        target=ProcessTarget((home.program, "-I", "-S", _RUN), home.env, mode="spawn"),
        envelope=envelope,
        rights=home.rights,
        deadline=time.monotonic() + TIMEOUT_S,
        hard_mb=_HARD_MB,
        max_output_bytes=_OUTPUT_BYTES,
    )


def _judge(right: Right, rights: Rights, tried: dict[str, str | None], held: Held, sandbox: Sandbox) -> Found:
    """What came of the attempts at a right: the names of errors, None where one worked."""
    may = _MAY.get(right, {})
    expected = {name: name in may and may[name](rights) for name in tried}
    escaped = [name for name, error in tried.items() if error is None and not expected[name]]
    words = [_in_words(name, error, expected[name]) for name, error in tried.items()]
    gaps = [gap.partition(": ")[2] for gap in sandbox.missing if gap.startswith(f"{right}:")]
    by = held.by if right in sandbox.enforced else ()
    gives = {"write": rights.write, "network": bool(rights.network), "exec": rights.exec}
    return Found(gives.get(right, False), not escaped, by, "; ".join(words + gaps))


def _in_words(name: str, error: str | None, expected: bool) -> str:
    if error is None:
        return f"{name} works" if expected else f"{name} works, though not allowed"
    return f"{name} refused ({error})" + (", though allowed" if expected else "")


_MAY: dict[Right, dict[str, Callable[[Rights], bool]]] = {
    "write": {"scratch": lambda _: True, "state": lambda rights: rights.write},
    "network": dict.fromkeys(("TCP", "UDP", "unix", "listen"), lambda rights: rights.network is True),
    "exec": dict.fromkeys(("program", "by the loader"), lambda rights: rights.exec),
}
"""Of what is tried, all that a phase may allow."""
