"""`aal doctor`: what this machine and this folder offer a bus, by trying. Nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bus import memory as memory_files
from bus import provenance, records, segments, verification
from bus.checkpoints import root_at, told, tree_of
from bus.errors import BusError
from bus.ledger_key import LedgerKey
from bus.plugins import tiers_of
from bus.policy import PHASES
from runners import cgroups, trial
from runners.base import TIERS, Rights
from runners.confinement import RIGHTS
from runners.helpers import has_namespace
from runners.tiers import IN_MEMORY, file_system

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bus.overlays import Entry, Registry
    from bus.settings import Settings
    from bus.verification import VerifyReport
    from runners.tiers import Place
    from runners.trial import Findings, Found

MIN_PYTHON = (3, 11)
VERIFY_BYTES = 64 * 2**20
"""A ledger above this is not verified here, since that would take more than a few seconds."""

_TIGHT_MB = 512


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `fail`: calls cannot be made, or not all. `hint` is what to do."""

    name: str
    mark: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def examine(settings: Settings, registry: Registry, tried: Mapping[str, Findings] | None = None) -> Iterator[Finding]:
    """Every finding, in the order in which a person would look. `tried` is what `try_rights` gave, if it was asked."""
    yield python()
    yield kernel()
    yield pressure()
    yield memory()
    yield memory_limit(settings.cgroup)
    contained = containment()
    yield contained
    yield from scratch(settings, namespace=contained.mark == "ok")
    yield from rights(tried)
    for name, folder in (("logs", settings.logs), ("state", settings.state)):
        yield writable(name, folder)
    yield ledger(settings.ledger)
    yield from signing(settings)
    entries = registry.entries()
    yield overlays_folder(settings.overlays, entries)
    for entry in entries:
        yield overlay(entry)


def python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", "fail", found, "Use Python 3.11 or newer.")
    return Finding("python", "ok", found)


def kernel() -> Finding:
    found = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("kernel", "fail", found, "The bus runs on Linux.")
    return Finding("kernel", "ok", found)


def pressure() -> Finding:
    if memory_files.read().waiting is None:
        return Finding("pressure", "warn", "the kernel reports no memory pressure (PSI)", "Boot with psi=1.")
    return Finding("pressure", "ok", "the kernel reports memory pressure (PSI)")


def memory() -> Finding:
    machine = memory_files.read().machine
    limit = "no cgroup limit" if machine.limit_mb is None else f"cgroup limit {machine.limit_mb} MiB"
    found = f"{machine.used_mb} of {machine.total_mb} MiB used, {limit}"
    if machine.usable_mb < _TIGHT_MB:
        return Finding("memory", "warn", found, f"Give the bus {_TIGHT_MB} MiB or more.")
    return Finding("memory", "ok", found)


def memory_limit(wanted: str = "auto") -> Finding:
    """What would hold calls to HARD, were the bus started as this was."""
    name = "memory limit"
    if wanted == "off":
        return Finding(name, "ok", "HARD is held by looking at the calls: AAL_CGROUP=off")
    try:
        ground = cgroups.find()
    except cgroups.UnavailableError as error:
        return Finding(name, "ok", f"HARD is held by looking at the calls: {error}", error.hint)
    return Finding(name, "ok", f"HARD is held by the kernel: cgroups (v2) in {ground.base}")


def containment() -> Finding:
    """What holds together the programs that calls start."""
    try:
        if asyncio.run(has_namespace(Path.cwd())):
            return Finding("containment", "ok", "programs get a pid namespace of their own, and end with it")
    except OSError as error:
        return Finding("containment", "fail", f"no program can be started: {error.strerror}", "Is the machine full?")
    hint = (
        "Allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone), or serve as root."
    )
    found = "no pid namespace: orphans are found by parent and environment, AAL_SANDBOX=enforce refuses all calls"
    return Finding("containment", "warn", found, hint)


def scratch(settings: Settings, *, namespace: bool) -> Iterator[Finding]:
    """Where the scratch folders of calls lie, by tier, with or without a namespace."""
    tiers = tiers_of(settings)
    for tier in TIERS:
        yield _place(tier, tiers.place(tier, namespace=namespace), is_set=tier in tiers.folders)


def _place(tier: str, place: Place, *, is_set: bool) -> Finding:
    name, quota = f"scratch {tier}", f"{place.mb} MiB a call"
    if place.mounts:
        return Finding(name, "ok", f"memory of each helper's own (tmpfs), {quota}")
    variable = f"AAL_SCRATCH_{tier}"
    is_writable = writable(name, place.root)
    if is_writable.mark == "fail":
        return replace(is_writable, hint=f"Mend its permissions, or set {variable}.")
    free_mb, kind = _free_mb(place.root), file_system(place.root) or "an unknown file system"
    found = f"{place.root} ({kind}), {free_mb} MiB free, {quota}"
    if tier == "LOCAL" and kind not in IN_MEMORY:
        return Finding(name, "warn", f"{found}; it is not memory", f"Set {variable} to a folder on a tmpfs.")
    if is_set and not place.root.is_dir():
        return Finding(name, "warn", f"{found}; it is not there yet", "Is its disk mounted? The first call makes it.")
    if free_mb < place.mb:
        return Finding(name, "warn", found, f"Free some, or set {variable} to a folder with more room.")
    return Finding(name, "ok", found)


def _free_mb(folder: Path) -> int:
    """Of the file system that it is on, or would be made on, as ordinary users may have it."""
    status = os.statvfs(_nearest(folder))
    return status.f_bavail * status.f_frsize >> 20


def _nearest(folder: Path) -> Path:
    """What is there of it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def try_rights() -> dict[str, Findings]:
    """What this machine holds programs to, by phase and right. Raises OSError where none can be run to try it."""
    phases = {str(phase): Rights(rule.write, rule.network, rule.exec) for phase, rule in PHASES.items()}
    return asyncio.run(trial.find_out(phases))


def rights(tried: Mapping[str, Findings] | None = None) -> Iterator[Finding]:
    """Whether each phase is held to its rights."""
    try:
        for phase, found in (try_rights() if tried is None else tried).items():
            yield _held(phase, found)
    except OSError as error:
        yield Finding("rights", "fail", f"no program can be held to its rights: {error.strerror}", _HOLD_NOTHING)


_HOLD_NOTHING = "AAL_SANDBOX=off holds programs to nothing."


def _held(phase: str, found: Findings) -> Finding:
    name = f"rights {phase}"
    open_ = [f"{right} ({one.found})" for right, one in found.items() if not one.enforced]
    if not open_:
        by = dict.fromkeys(mechanism for one in found.values() for mechanism in one.by)
        return Finding(name, "ok", f"{', '.join(found)} held, by {', '.join(by)}")
    hint = "A kernel from Linux 6.12 on holds all, with Landlock and seccomp."
    return Finding(name, "warn", f"not held: {'; '.join(open_)}", hint)


RIGHTS_COLUMNS = ("phase", *RIGHTS)


def rights_rows(tried: Mapping[str, Findings]) -> Iterator[tuple[str, ...]]:
    """A table for people, one row a phase: what it gives, and whether the kernel held all else."""
    for phase, found in tried.items():
        yield (phase, *(_cell(found[right]) for right in RIGHTS))


def _cell(one: Found) -> str:
    return ("yes" if one.allowed else "no") + ("" if one.enforced else ", NOT HELD")


def rights_json(tried: Mapping[str, Findings]) -> dict[str, dict[str, dict[str, Any]]]:
    """The same for programs: `{phase: {right: {"allowed", "enforced", "by", "found"}}}`."""
    return {phase: {right: one._asdict() for right, one in found.items()} for phase, found in tried.items()}


def writable(name: str, folder: Path) -> Finding:
    """Whether the folder can be written, or made where it is not there yet."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return Finding(name, "ok", f"{folder} can be written")
    except OSError as error:
        hint = f"Mend its permissions, or set AAL_{name.upper()}."
        return Finding(name, "fail", f"{folder} cannot be written: {error.strerror}", hint)


def ledger(path: Path) -> Finding:
    try:
        size = segments.total_bytes(path)
        if not provenance.exists(path):
            return Finding("ledger", "ok", "none yet; the first call begins it")
        if records.is_foreign(provenance.first_line(path)):
            hint = "The next start keeps it under another name and begins a new chain."
            return Finding("ledger", "warn", f"{path} is another program's log", hint)
        if size > VERIFY_BYTES:
            return Finding("ledger", "ok", f"{size >> 20} MiB, not verified here", "aal provenance verify")
        return _verdict(verification.verify(path))
    except OSError as error:
        return Finding("ledger", "fail", f"{path} cannot be read: {error.strerror}", "Mend its permissions.")


def _verdict(report: VerifyReport) -> Finding:
    if report.fault == "torn":
        hint = "The next start cuts it off and keeps it beside the log. Where it does not, it was changed."
        return Finding("ledger", "warn", f"line {report.first_bad}: {report.reason}", hint)
    if not report.ok:
        hint = "Keep a copy, find out who changed it, and begin a new one."
        if report.fault == "json":
            hint = f"The next start cuts off what a power loss left. Where it does not: {hint[0].lower()}{hint[1:]}"
        return Finding("ledger", "fail", f"line {report.first_bad}: {report.reason}", hint)
    return Finding("ledger", "ok", f"{report.lines} lines, all good")


def signing(settings: Settings) -> Iterator[Finding]:
    """With a key: whether the ledger is the one that it has signed."""
    name = "signing"
    try:
        notary = LedgerKey(settings.state).notary()
        if notary is None:
            return
        known = notary.known()
        with segments.Segments(settings.ledger, at_rest=True) as log:
            whole, _ = tree_of(map(told, log.backwards()))
            notary.require(known, whole.size, lambda size: root_at(size, whole, log.backwards()))
    except records.BrokenLineError as error:
        yield Finding(name, "fail", f"the ledger's end cannot be read: {error.detail}", "aal provenance verify")
    except BusError as error:
        yield Finding(name, "fail", error.detail, error.hint or "")
    except OSError as error:
        yield Finding(name, "fail", f"the ledger cannot be read: {error.strerror}", "Mend its permissions.")
    else:
        yield Finding(name, "ok", f"{known[-1].size} lines signed and there" if known else "nothing signed yet")


def overlays_folder(folder: Path, entries: list[Entry]) -> Finding:
    if not folder.is_dir():
        return Finding("overlays", "warn", f"there is no folder {folder}", "aal overlays new NAME makes one.")
    return Finding("overlays", "ok" if entries else "warn", f"{len(entries)} in {folder}")


def overlay(entry: Entry) -> Finding:
    """Whether its manifest is sound, its programs being there included. A disabled one keeps no call waiting."""
    name = f"overlay {entry.name}"
    if not entry.enabled:
        return Finding(name, "ok", "disabled")
    if entry.manifest is None:
        reason = entry.error.detail if entry.error else "its manifest cannot be read"
        return Finding(name, "fail", reason, f"aal overlays check {entry.name}")
    if entry.manifest.warnings:
        return Finding(name, "warn", "; ".join(entry.manifest.warnings), f"aal overlays check {entry.name}")
    return Finding(name, "ok", entry.manifest.version)
