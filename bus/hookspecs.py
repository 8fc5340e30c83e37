"""The plugin API: every hook, its arguments, and what an exception in it does. Plain functions, called in process.

A plugin is a module or object with functions of these names marked `@hookimpl`, found through the entry-point group
`aal`. A function may leave out arguments that it does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from starlette.routing import BaseRoute

    from bus.dispatch import Bus
    from bus.model import Invocation, Manifest, Record
    from runners.base import Runner

PROJECT = "aal"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterRunner(Protocol):
    """Makes a runner available under `runner.name`; a later one of the same name takes its place."""

    def __call__(self, runner: Runner) -> None: ...


class RegisterStressSource(Protocol):
    """Adds a source of stress. `read` gives 0.0 to 1.0, or None where it has nothing to say.

    It is called in a thread of its own, one call at a time, and may take a while: until then its last answer counts,
    and none once it takes seconds. One named `memory` or `pressure` takes the place of the bus's own.
    """

    def __call__(self, name: str, read: Callable[[], float | None]) -> None: ...


class RegisterRoutes(Protocol):
    """Adds routes to the HTTP application, after the bus's own."""

    def __call__(self, routes: Iterable[BaseRoute]) -> None: ...


@hookspec
def aal_register_runners(register: RegisterRunner) -> None:
    """Called once when a bus is made. An exception stops the start; so does a runner that lacks a part of `Runner`."""


@hookspec
def aal_check_overlay(manifest: Manifest, folder: Path) -> Iterable[str]:
    """Called when an overlay is loaded. Each text given is a fault that keeps the overlay out; so is an exception."""
    return ()


@hookspec
def aal_authorize(invocation: Invocation, manifest: Manifest) -> None:
    """Called after the bus itself has authorized a call. May only tighten: raise `DeniedError` to refuse.

    Any other exception refuses as well.
    """


@hookspec
def aal_stress_sources(register: RegisterStressSource) -> None:
    """Called once when a bus is made. The bus's stress is the largest of its sources."""


@hookspec
def aal_invocation_finished(record: Record) -> None:
    """Called after each record was written, with a copy of its members but for `payload` and `result`.

    Each plugin is called apart; an exception is logged and dropped.
    """


@hookspec
def aal_routes(register: RegisterRoutes, bus: Bus) -> None:
    """Called once when the HTTP application is made. An exception stops the start."""
