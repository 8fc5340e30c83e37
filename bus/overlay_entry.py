"""One overlay as the registry gives it: to a call as `Resolved`, to people and programs as `Entry`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bus import purges
from bus.canonical import shown
from bus.errors import DeniedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bus.errors import Fault
    from bus.manifests import ManifestError
    from bus.model import Capability, Manifest


@dataclass(frozen=True, slots=True)
class Entry:
    """One overlay as it stands: `manifest`, or the `error` that keeps it out.

    `name` is the folder's as the file system has it, so that of a broken overlay may be no text that JSON can carry;
    what `summary` and `detail` give is. `links` are the symbolic links that lead outside the overlay's folder, each as
    `path -> resolved target`.
    """

    name: str
    folder: Path
    manifest: Manifest | None = None
    error: ManifestError | None = None
    enabled: bool = True
    links: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """`broken`, `disabled`, or what the manifest says (`active` where it says nothing)."""
        if self.manifest is None:
            return "broken"
        return self.manifest.status if self.enabled else "disabled"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people should know of the manifest, sound or not."""
        said = self.manifest or self.error
        return said.warnings if said else ()

    def usable(self) -> Manifest:
        """The manifest, for a call. Raises `DeniedError` if the overlay is disabled or broken."""
        if not self.enabled:
            raise DeniedError("ERR_OVERLAY_DISABLED", f"overlay {shown(self.name)!r} is disabled")
        if self.manifest is None:
            detail, faults = (
                (self.error.detail, self.error.faults) if self.error else (f"overlay {shown(self.name)!r}", ())
            )
            raise DeniedError("ERR_OVERLAY_BROKEN", detail, faults=faults)
        return self.manifest

    def summary(self) -> dict[str, Any]:
        """The overlay in a list, as JSON. `capabilities` of shape A are its permissions, as they always were."""
        manifest = self.manifest
        permissions = sorted(manifest.permissions) if manifest else []
        capabilities = manifest.capabilities if manifest else {}
        return {
            "name": shown(self.name),
            "version": manifest.version if manifest else None,
            "status": self.status,
            "description": manifest.description if manifest else "",
            "phases": list(manifest.phases) if manifest else [],
            "capabilities": permissions if manifest and manifest.shape == "A" else list(capabilities),
            "permissions": permissions,
            "runners": sorted({capability.runner for capability in capabilities.values()}),
            "deterministic": manifest.deterministic if manifest else False,
            "prefers_gpu": manifest.prefers_gpu if manifest else False,
            "enabled": self.enabled,
            "warnings": list(map(shown, self.warnings)),
            "error": self.error.detail if self.error else None,
            "faults": [_fault_as_json(fault) for fault in self.error.faults] if self.error else [],
            "links": list(self.links),
            "folder": shown(self.folder.name),
        }

    def detail(self, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`summary` and everything about each capability, as JSON.

        `measured` has, by the name of the capability, what its calls needed of memory; null where nobody says.
        """
        manifest = self.manifest
        if manifest is None:
            return self.summary() | {"details": {}}
        return self.summary() | {
            "shape": manifest.shape,
            "manifest_hash": manifest.manifest_hash,
            "op_policy": {op: list(needs) for op, needs in manifest.op_policy.items()} if manifest.op_policy else None,
            "cacheable": manifest.cacheable,
            "requires_auth": manifest.requires_auth,
            "env": list(manifest.env),
            "secrets": list(manifest.secrets),
            "resources": dict(manifest.resources),
            **_processes_as_json(manifest),
            "details": {
                name: _capability_as_json(offered) | {"measured": (measured or {}).get(name)}
                for name, offered in manifest.capabilities.items()
            },
        }


class Resolved(NamedTuple):
    """What a call goes to. `code_hash` is that of the folder at this moment.

    `edition` counts what the overlay has been: each change of its folder, its manifest, its code, its installed
    packages or the memory profiles that it names gives a number higher than every one before.
    """

    manifest: Manifest
    capability: Capability
    code_hash: str
    edition: int = 0


def _fault_as_json(fault: Fault) -> dict[str, str]:
    return {"path": fault.path, "found": fault.found, "allowed": fault.allowed}


def _processes_as_json(manifest: Manifest) -> dict[str, Any]:
    """How the overlay's programs run; null for what it has not: a program, workers, a service that the bus starts.

    `purged_on` is when what keeps running is told to let go of its caches: `stress`, `event`.
    """
    tier = {"tier": manifest.resident_tier}
    return {
        "mode": manifest.mode if manifest.has_program else None,
        "stdin": manifest.stdin if manifest.has_program else None,
        "preload": list(manifest.preload),
        "workers": asdict(manifest.workers) | tier if manifest.mode == "worker" else None,
        "service": asdict(manifest.service) | tier if manifest.service else None,
        "purged_on": purges.occasions(manifest),
    }


def _capability_as_json(capability: Capability) -> dict[str, Any]:
    memory = capability.memory
    return {
        "description": capability.description,
        "runner": capability.runner,
        "phases": list(capability.phases),
        "timeout_s": capability.timeout_s,
        "argv": list(capability.argv),
        "method": capability.method if capability.url else None,
        "url": _without_user(capability.url) or None,
        "memory": {
            "profile": memory.name or "custom",
            "soft_mb": memory.soft_mb,
            "hard_mb": memory.hard_mb,
            "tier": memory.tier,
            "priority": memory.priority,
        },
        "degradation": {
            "max_fraction": capability.degradation.max_fraction,
            "disable_nonessential": capability.degradation.disable_nonessential,
        },
        "concurrency": capability.concurrency,
        "cost_cents": capability.cost_cents,
        "idempotent": capability.idempotent,
        "rights": {
            "read": list(map(shown, capability.read_paths)),
            "write": list(map(shown, capability.write_paths)),
            "network": capability.network if isinstance(capability.network, bool) else list(capability.network),
        },
        "input_schema": capability.input_schema,
        "output_schema": capability.output_schema,
    }


def _without_user(url: str) -> str:
    """A URL without the user and password that it may carry: the list of overlays is for everybody."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"
