"""Where the calls of an overlay go, and with what environment: made once for each edition, and kept."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from bus import policy, purges
from bus.errors import OperatorError
from runners.base import HttpTarget, ProcessTarget, ServiceTarget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bus.model import Capability, Manifest, Service
    from bus.overlays import Resolved
    from bus.secrets import Secrets
    from bus.settings import Settings

_ENV_ALLOWED = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER")


@dataclass(frozen=True, slots=True)
class _Means:
    """What the calls of one edition of an overlay share.

    `secrets` is the stamp of the secrets that its environment was made with, None where it depends on none. `env` is
    that of its programs, empty where it has none; `state` the folder for their state, with a `/` behind it, so
    that nothing else can be there; `is_purged` whether the overlay is told of a purge while memory is short; `targets`
    is where each capability's calls go.
    """

    edition: int
    secrets: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    state: str | None = None
    is_purged: bool = False
    targets: dict[str, ProcessTarget | HttpTarget] = field(default_factory=dict)


class Targets:
    """The targets of a bus."""

    def __init__(self, settings: Settings, secrets: Secrets) -> None:
        self._settings = settings
        self._secrets = secrets
        self._passed = settings.listed("pass_env")
        self._means: dict[str, _Means] = {}

    def of(self, resolved: Resolved, payload: Mapping[str, Any]) -> ProcessTarget | HttpTarget:
        """Where the call goes; only what a GET asks for is the call's own. Raises as `prepare`."""
        means, capability = self._means_of(resolved), resolved.capability
        target = means.targets.get(capability.name)
        if target is None:
            target = means.targets[capability.name] = _target_of(resolved.manifest, capability, means.env)
        if capability.method == "GET" and isinstance(target, HttpTarget):
            return dataclasses.replace(target, query=_query(payload))
        return target

    def prepare(self, resolved: Resolved) -> None:
        """Raises `OperatorError` without a folder for the overlay's state, `DeniedError` (ERR_SECRET) for a secret."""
        self._means_of(resolved)

    def are_outdated(self, resolved: Resolved) -> bool:
        """Whether processes of this edition hold a secret that has changed, or a folder that somebody removed.

        A variable that they were given because it was asked for by its name may be a secret by now.
        """
        means = self._means.get(resolved.manifest.name)
        if means is None or means.edition != resolved.edition:
            return False
        has_its_state = means.state is None or os.access(means.state, os.F_OK)
        return not has_its_state or (means.secrets is not None and means.secrets != self._secrets.stamp())

    def purged_under_stress(self) -> list[str]:
        """The overlays that were called and are told to let go of their caches while memory is short."""
        return [name for name, means in self._means.items() if means.is_purged]

    def forget(self, overlay: str) -> None:
        self._means.pop(overlay, None)

    def _means_of(self, resolved: Resolved) -> _Means:
        """What the calls of this edition have in common."""
        name = resolved.manifest.name
        means = self._means.get(name)
        if means is not None and means.edition == resolved.edition:
            return means
        fresh = self._new_means(resolved)
        if means is None or means.edition < resolved.edition:  # else it is a late call's
            self._means[name] = fresh
        return fresh

    def _new_means(self, resolved: Resolved) -> _Means:
        manifest = resolved.manifest
        secrets = self._secrets.stamp() if manifest.secrets or manifest.env or self._passed else None
        is_purged = "stress" in purges.occasions(manifest)
        if not manifest.starts_programs:
            return _Means(resolved.edition, secrets, is_purged=is_purged)
        env = child_env(manifest, self._settings, self._secrets)
        return _Means(resolved.edition, secrets, env, env["OVERLAY_STATE"] + "/", is_purged)


def _target_of(manifest: Manifest, capability: Capability, env: Mapping[str, str]) -> ProcessTarget | HttpTarget:
    if capability.argv:
        workers = dataclasses.replace(manifest.workers, tier=manifest.resident_tier)
        return ProcessTarget(capability.argv, env, manifest.stdin, manifest.mode, manifest.preload, workers)
    repeatable = capability.idempotent or manifest.deterministic
    service = None if manifest.service is None else _service_of(manifest, manifest.service, env)
    purge_url = manifest.purge_url
    return HttpTarget(capability.url, capability.method, repeatable=repeatable, service=service, purge_url=purge_url)


def _service_of(manifest: Manifest, service: Service, env: Mapping[str, str]) -> ServiceTarget:
    """The service that calls go to which the bus starts."""
    return ServiceTarget(
        service.argv,
        env,
        service.ready_path,
        service.start_timeout_s,
        service.idle_s,
        service.max_mb,
        policy.service_rights(manifest),
        manifest.resident_tier,
    )


def child_env(manifest: Manifest, settings: Settings, secrets: Secrets) -> dict[str, str]:
    """An allow-list, never the bus's own environment, and the overlay's secrets; makes the overlay's state folder.

    Python's hashes are fixed, so that a replay can match. A `.venv` of the overlay's own comes first on the PATH.
    Raises `OperatorError`, and `DeniedError` (ERR_SECRET).
    """
    passed = {*_ENV_ALLOWED, *settings.listed("pass_env"), *manifest.env} - secrets.withheld()
    env = {name: os.environ[name] for name in sorted(passed) if name in os.environ and not name.startswith("AAL_")}
    env |= secrets.for_overlay(manifest.name, manifest.secrets)
    env["PATH"] = f"{manifest.folder / '.venv' / 'bin'}:{env.get('PATH', os.defpath)}"
    state = settings.state_of(manifest.name)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError("ERR_FILES", f"cannot make the folder {state}: {error.strerror}") from error
    if settings.sandbox != "off":  # git ends where it sees a file of its user's that it may not read
        env.setdefault("GIT_CONFIG_GLOBAL", os.devnull)
    return env | {"PYTHONHASHSEED": "0", "OVERLAY_STATE": str(state)}


def _query(payload: Mapping[str, Any]) -> dict[str, str]:
    """The scalars of a payload, as the query of a GET."""
    return {
        name: value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in payload.items()
        if isinstance(value, str | int | float | bool)
    }
