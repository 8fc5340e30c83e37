"""One plugin manager a Bus: loads the built-ins and whatever the entry-point group `aal` names, and calls the hooks.

A gate (`aal_authorize`, `aal_check_overlay`) that fails denies. An observer (`aal_invocation_finished`) that fails is
logged and dropped, and never keeps another from being called.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from bus import hookspecs, policy
from bus.canonical import shown
from bus.errors import DeniedError
from bus.hookspecs import hookimpl
from bus.metrics import Metrics
from runners import python_command, scratch_root
from runners.cgroups import Cgroups
from runners.confinement import Case, Confinement
from runners.helpers import Helpers
from runners.http import HttpRunner
from runners.logs import OverlayLogs
from runners.process import ProcessRunner
from runners.services import Services
from runners.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pluggy import HookImpl
    from starlette.routing import BaseRoute

    from bus.dispatch import Bus
    from bus.hookspecs import RegisterRunner
    from bus.model import Invocation, Manifest, Record
    from bus.settings import Settings
    from runners.base import Runner, Tier

log = logging.getLogger(__name__)

_KEPT_BACK = frozenset({"payload", "result"})


class BuiltIn:
    """What every bus has: the two runners, and a look at what a manifest asks of them."""

    def __init__(self, settings: Settings, confinement: Confinement, redact: Callable[[bytes], bytes]) -> None:
        self._settings = settings
        self._confinement = confinement
        self._redact = redact

    @hookimpl
    def aal_register_runners(self, register: RegisterRunner) -> None:
        settings = self._settings
        for root in self._confinement.tiers.roots():
            scratch_root.sweep(root)  # of a bus that was killed nothing stays beyond the next start
        logs = OverlayLogs(settings.overlay_logs, redact=self._redact)
        idle_s = settings.helper_idle_s
        cgroups = Cgroups() if settings.cgroup == "auto" else None
        helpers, service_helpers = (  # each runner closes its own
            Helpers(idle_s=idle_s, confinement=self._confinement, redact=self._redact, cgroups=cgroups)
            for _ in range(2)
        )
        register(ProcessRunner(helpers, logs, kill_grace_s=settings.kill_grace_s, idle_s=idle_s))
        services = Services(service_helpers, logs, kill_grace_s=settings.kill_grace_s, drain_s=settings.drain_s)
        register(HttpRunner(services, targets=frozenset(settings.listed("targets"))))

    @hookimpl
    def aal_check_overlay(self, manifest: Manifest) -> Iterable[str]:
        """What the manifest asks for and is not to have."""
        return [*self._ours(manifest), *_not_forked(manifest)]

    def _ours(self, manifest: Manifest) -> Iterator[str]:
        """Rights to what the bus keeps for itself, but for the overlay's own state and folder."""
        asked = _paths_asked_for(manifest)
        if not asked:
            return
        kept = self._confinement.kept_from((self._settings.state_of(manifest.name), manifest.folder))
        for name, path in asked:
            if kept.is_reached_by(Path(path)):
                yield f"a right of {name} to {shown(path)}, where the bus keeps what is its own"


def confinement_of(settings: Settings) -> Confinement:
    """How the processes of this bus are held to their rights."""
    tiers = tiers_of(settings)
    return Confinement(
        mode=settings.sandbox,
        tiers=tiers,
        max_processes=settings.max_processes,
        kept=(*_kept_by(settings), *tiers.kept()),
    )


def tiers_of(settings: Settings) -> Tiers:
    """Where the scratch folders of calls lie."""
    quotas: dict[Tier, int] = {
        "LOCAL": settings.scratch_mb,
        "EXTENDED": settings.scratch_extended_mb,
        "COLD": settings.scratch_cold_mb,
    }
    return Tiers(settings.scratch, quotas, settings.scratch_set())


def scratch_of(manifest: Manifest, tiers: Tiers) -> dict[str, dict[str, Any]]:
    """Where the scratch folders of its calls lie, by tier, as JSON for people.

    `place` is `memory` or a folder, `mb` what a call may have there, in MiB.
    """
    places = {tier: tiers.place(tier, namespace=True) for tier in manifest.tiers}
    return {
        tier: {"place": "memory" if place.mounts else shown(str(place.root)), "mb": place.mb}
        for tier, place in places.items()
    }


def _kept_by(settings: Settings) -> tuple[Path, ...]:
    """What the bus has for itself: tokens, secrets, the ledger, state and code of the overlays, settings, profiles."""
    return (settings.state, settings.logs, settings.overlays, settings.file, settings.profiles)


def cases_of(manifest: Manifest) -> Iterator[Case]:
    """What the kernel has to hold of an overlay, by all that is known before it is called."""
    for capability, rights in policy.in_use(manifest):
        if capability.argv:
            may_fork = manifest.mode in ("auto", "fork") and python_command.split(capability.argv) is not None
            yield Case(rights, forks=may_fork)
    if manifest.service is not None:
        rights = policy.service_rights(manifest)
        yield Case(rights, listen=() if rights.network is True else _ANY_PORT)


_ANY_PORT = (1,)
"""Which one it will be is not known yet."""


def _paths_asked_for(manifest: Manifest) -> list[tuple[str, str]]:
    """Those of the rights of each capability, with its name."""
    capabilities = manifest.capabilities.values()
    return list(dict.fromkeys((one.name, path) for one in capabilities for path in (*one.read_paths, *one.write_paths)))


def _not_forked(manifest: Manifest) -> Iterator[str]:
    """A command that a fork cannot run: the mode was asked for, so that it is not quietly another."""
    if manifest.mode != "fork":
        return
    for argv in dict.fromkeys(offered.argv for offered in manifest.capabilities.values() if offered.argv):
        if python_command.split(argv) is None:
            said = shlex.join(argv)
            yield f"mode fork with {said!r}, which cannot be forked; python3 path.py or python3 -m module can"


class Plugins:
    """The hooks, each as a method with the semantics that `hookspecs.py` gives it.

    `redact` takes out of a log what nobody is to read there.
    """

    def __init__(
        self, settings: Settings, extra: Iterable[object] = (), *, redact: Callable[[bytes], bytes] = bytes
    ) -> None:
        self.confinement = confinement_of(settings)
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        for plugin in (BuiltIn(settings, self.confinement, redact), Metrics(), *extra):
            self.manager.register(plugin)
        self.manager.load_setuptools_entrypoints(hookspecs.PROJECT)
        self.manager.check_pending()
        self._gates = self._implementations("aal_authorize")
        self._observers = self._implementations("aal_invocation_finished")

    def runners(self) -> dict[str, Runner]:
        """Every runner by name. Built-ins come first, so that a plugin's runner can take a name over.

        Raises `PluginValidationError` for one that is no `Runner`, as a plugin made for another version may bring.
        """
        found: dict[str, Runner] = {}
        for impl in self._implementations("aal_register_runners"):

            def register(runner: Runner, plugin: object = impl.plugin) -> None:
                if lacking := _lacks(runner):
                    raise pluggy.PluginValidationError(plugin, f"the runner {runner!r} has no {', '.join(lacking)}")
                found[runner.name] = runner

            _call(impl, register=register)
        return found

    def stress_sources(self) -> dict[str, Callable[[], float | None]]:
        """Those of plug-ins by name. The monitor has its own, of which one with the same name takes the place."""
        found: dict[str, Callable[[], float | None]] = {}

        def register(name: str, read: Callable[[], float | None]) -> None:
            found[name] = read

        for impl in self._implementations("aal_stress_sources"):
            _call(impl, register=register)
        return found

    def check_overlay(self, manifest: Manifest, folder: Path) -> list[str]:
        """Every plugin's faults; a plugin that fails is a fault."""
        faults: list[str] = []
        for impl in self._implementations("aal_check_overlay"):
            try:
                faults += _call(impl, manifest=manifest, folder=folder) or ()
            except Exception as error:
                log.exception("plugin %s failed to check overlay %s", impl.plugin_name, manifest.name)
                faults.append(f"plugin {impl.plugin_name} failed: {error}")
        return faults

    def authorize(self, invocation: Invocation, manifest: Manifest) -> None:
        """Raise what a plugin refuses with; any exception of a plugin but `DeniedError` is ERR_VETOED."""
        for impl in self._gates:
            try:
                _call(impl, invocation=invocation, manifest=manifest)
            except DeniedError:
                raise
            except Exception as error:
                log.exception("plugin %s failed to authorize", impl.plugin_name)
                raise DeniedError("ERR_VETOED", f"plugin {impl.plugin_name} failed: {error}") from error

    def finished(self, record: Record) -> None:
        for impl in self._observers:
            try:
                _call(impl, record=_to_observe(record))
            except Exception:
                log.exception("plugin %s failed on a finished invocation", impl.plugin_name)

    def routes(self, bus: Bus) -> list[BaseRoute]:
        found: list[BaseRoute] = []
        for impl in self._implementations("aal_routes"):
            _call(impl, register=found.extend, bus=bus)
        return found

    def _implementations(self, hook: str) -> list[HookImpl]:
        """In the order of registration; pluggy's own calls go the other way round and stop at the first exception."""
        implementations: list[HookImpl] = getattr(self.manager.hook, hook).get_hookimpls()
        return implementations


@contextlib.contextmanager
def spared(runner: Runner, what: str) -> Iterator[None]:
    """Keep what a runner raises from the others: it may be a plugin's. `what` goes on in the log from "could not"."""
    try:
        yield
    except Exception:
        log.exception("the runner %s could not %s", runner.name, what)


def _lacks(runner: Runner) -> list[str]:
    """What of the protocol `Runner` an object has not, as a programmer would write it."""
    members = ("name", "run", "state", "shares", "relieve", "purge", "forget", "close")
    lacking = [name for name in members if not hasattr(runner, name)]
    if "close" not in lacking:
        try:
            inspect.signature(runner.close).bind(at_once=True)
        except TypeError:
            lacking.append("close(*, at_once)")
    return lacking


def _to_observe(record: Record) -> Record:
    members = record.copy()
    for name in _KEPT_BACK:
        members.pop(name, None)
    return members


def _call(impl: HookImpl, **arguments: Any) -> Any:  # noqa: ANN401
    return impl.function(**{name: arguments[name] for name in impl.argnames})
