"""Reads the `manifest.json` of one folder into a `Manifest`, whichever of the three shapes it has.

Every fault is found in one go: the form first (`manifest_form.py`), then what a schema cannot say. Only then is the
manifest refused, or normalised.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import ipaddress
import itertools
import os
import re
import shlex
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus import manifest_form, runes
from bus.canonical import shown
from bus.codehash import open_file
from bus.errors import BusError, Fault
from bus.manifest_form import MAX_FAULTS, at_most, json_path, schema_faults
from bus.model import Capability, Degradation, Manifest, Permission, Phase, Service
from runners.base import JsonError, Workers, parse_json
from runners.programs import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from bus.manifest_form import Form
    from bus.runes import MemoryProfile

FILE = "manifest.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""What an overlay may be called; use it with `fullmatch`."""

CAPABILITY_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?")
MAX_BYTES = 1_000_000
RUN = "run"
"""The one capability of an overlay of shape A."""

RUNNERS = ("proc", "http")
DEFAULT_PROFILE = "MINIMAL"
DEFAULT_PHASES = (Phase.OPEN, Phase.ALIGN, Phase.CLEAR, Phase.SEAL)
STDIN_FLAG = "--stdin-json"
"""The last argument of every proc capability of shapes B and native."""

_OF_SERVICE: Mapping[str, Callable[[Any], Any]] = {
    "ready_path": str,
    "start_timeout_s": float,
    "idle_s": float,
    "max_mb": int,
}
_OF_WORKERS: Mapping[str, Callable[[Any], Any]] = {
    "count": int,
    "max_calls": int,
    "max_mb": int,
    "start_timeout_s": float,
    "purge": bool,
}
_OF_KERNEL = ("/proc", "/sys")
"""What these name is another thing to each process that looks, so that nobody can say what a right to it gives."""

_SAID_AT_ONCE = 3
_SHOWN = 120
_SHOWN_ALLOWED = 400
_LABEL = r"\w(?:[\w-]{0,61}\w)?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")


class ManifestError(BusError):
    """A manifest that cannot be used; `faults` has what is wrong with it, `warnings` what else people should know.

    `is_lasting`: the same files will give the same error, while one that is not may pass without a change of them.
    """

    def __init__(
        self, overlay: str, faults: Sequence[Fault], *, warnings: Sequence[str] = (), is_lasting: bool = True
    ) -> None:
        faults = [
            Fault(_cut(fault.path, _SHOWN), _cut(fault.found, _SHOWN), _cut(fault.allowed, _SHOWN_ALLOWED))
            for fault in at_most(faults, Fault("$", "more faults", "none"))
        ]
        self.warnings = tuple(warnings)
        self.is_lasting = is_lasting
        said = "; ".join(map(str, faults[:_SAID_AT_ONCE]))
        more = f"; and {len(faults) - _SAID_AT_ONCE} more" if len(faults) > _SAID_AT_ONCE else ""
        super().__init__("ERR_OVERLAY_BROKEN", f"overlay {shown(overlay)!r}: {said}{more}", faults=faults)


def read(
    folder: Path,
    *,
    default_timeout_s: float = 30.0,
    runners: Collection[str] = RUNNERS,
    profile_of: Callable[[str], MemoryProfile] = runes.resolve,
) -> Manifest:
    """The manifest of an overlay's folder. `runners` are the names that a capability may give as its runner.

    `profile_of` gives the memory profile of a name or a rune, or raises `RuneError`; without it the shipped ones are
    known. Raises `ManifestError`, and nothing else, whatever lies there.
    """
    name = overlay_name(folder)
    text = _read_bytes(folder, name)
    try:
        document = parse_json(text)
    except JsonError as error:
        raise ManifestError(name, [Fault(FILE, str(error), "one JSON object")]) from None
    form = manifest_form.examine(document)
    reading = _Reading(name, folder.resolve(), form, default_timeout_s, runners=runners, profile_of=profile_of)
    manifest = reading.manifest(hashlib.sha256(text).hexdigest())
    if reading.faults:
        faults = sorted(set(reading.faults), key=str)
        raise ManifestError(name, faults, warnings=manifest.warnings, is_lasting=reading.is_lasting)
    return manifest


def overlay_name(folder: Path) -> str:
    """What the overlay in a folder must be called: the folder's own name, not that of what a link leads to."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100  # resolve() would follow the link


def local_name(overlay: str, capability: str) -> str:
    """A capability's name without the overlay's before it: `psyfi.ping` and `ping` are both `ping` to `psyfi`."""
    return capability.removeprefix(f"{overlay}.")


def _read_bytes(folder: Path, name: str) -> bytes:
    allowed = f"a readable file of at most {MAX_BYTES} bytes"
    try:
        with open_file(folder / FILE) as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ManifestError(name, [Fault(FILE, found, allowed)], is_lasting=_is_lasting(error)) from None
    if len(text) > MAX_BYTES:
        raise ManifestError(name, [Fault(FILE, "a larger file", allowed)])
    return text


def _is_lasting(error: Exception) -> bool:
    """Whether it will not pass before the path leads to something else; that no descriptor is free passes."""
    return not isinstance(error, OSError) or error.errno in {errno.ENOENT, errno.EISDIR, errno.EINVAL, errno.ELOOP}


class _Reading:
    """One manifest while it is read. Methods give the normalised part and note what is wrong with it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        form: Form,
        default_timeout_s: float,
        *,
        runners: Collection[str],
        profile_of: Callable[[str], MemoryProfile],
    ) -> None:
        self.name = name
        self.folder = folder
        self.form = form
        self.document: Mapping[str, Any] = form.document
        self.faults = list(form.faults)
        self.is_lasting = True
        self._links: list[tuple[list[str | int], str, str]] = []
        self._default_timeout_s = default_timeout_s
        self._runners = runners
        self._profile_of = profile_of
        self._broken_default = ""
        self._phases = tuple(dict.fromkeys(map(Phase, self.document.get("phases", DEFAULT_PHASES))))

    def manifest(self, manifest_hash: str) -> Manifest:
        """The whole, worth something only if no faults were noted."""
        document = self.document
        policy = document.get("policy", {})
        self._check_name()
        capabilities = self._run() if self.form.shape == "A" else self._capabilities()
        self._check_links(capabilities)
        return Manifest(
            name=self.name,
            version=document.get("version", ""),
            shape=self.form.shape,
            folder=self.folder,
            manifest_hash=manifest_hash,
            phases=self._phases,
            permissions=self._permissions(),
            capabilities=capabilities,
            description=document.get("description", ""),
            status=document.get("status", "active"),
            op_policy=self._op_policy(),
            deterministic=policy.get("deterministic", False),
            cacheable=policy.get("cacheable", False),
            requires_auth=policy.get("requires_auth", False),
            env=tuple(document.get("env", ())),
            secrets=tuple(document.get("secrets", ())),
            **self._process(),
            service=self._service(),
            purge_url=self._purge_url(),
            resources=document.get("resources", {}),
            warnings=(*self.form.warnings, *itertools.islice(self._not_kept(), MAX_FAULTS)),
        )

    def _entrypoint(self, kind: str) -> Mapping[str, Any]:
        """What is sound of an entrypoint; empty where there is nothing."""
        found: Mapping[str, Any] = self.document.get("entrypoints", {}).get(kind, {})
        return found

    def _process(self) -> dict[str, Any]:
        """The members of `Manifest` that say how a program runs, as far as they are given."""
        proc = self._entrypoint("proc")
        found = _known_members(proc, "stdin", "mode")
        if found.get("mode") == "worker":
            found["stdin"] = "pipe"
        if "preload" in proc:
            found["preload"] = tuple(dict.fromkeys(proc["preload"]))
        if "workers" in proc:
            found["workers"] = Workers(**{name: _OF_WORKERS[name](value) for name, value in proc["workers"].items()})
        return found

    def _service(self) -> Service | None:
        """The service that the bus starts, if there is one."""
        http = self._entrypoint("http")
        if "command" not in http:
            return None
        given = {name: read(http[name]) for name, read in _OF_SERVICE.items() if name in http}
        return Service(tuple(http["command"]), **given)

    def _purge_url(self) -> str | None:
        http = self._entrypoint("http")
        return _join(http.get("base_url", ""), http["purge_path"]) if "purge_path" in http else None

    def _not_kept(self) -> Iterator[str]:
        """What the manifest asks for and cannot have, so that nobody relies on it."""
        if self._broken_default:
            yield f"memory is that of the {DEFAULT_PROFILE} that ships with the bus, since of {self._broken_default}"
        if "command" in self._entrypoint("http"):
            return
        for name, given in self._given_capabilities().items():
            if given.get("runner") == "http" and given.get("rights"):
                path = json_path("capabilities", name, "rights")
                yield f"{path} cannot be held: the service is not a process of the bus"

    def _given_capabilities(self) -> Mapping[str, Mapping[str, Any]]:
        """The capabilities as they stand in shapes B and native; those of shape A are permissions."""
        return {} if self.form.shape == "A" else self.document.get("capabilities", {})

    def _fault(self, parts: Sequence[str | int], found: str, allowed: str) -> None:
        self.faults.append(Fault(json_path(*parts), found, allowed))

    def _check_name(self) -> None:
        given = self.document.get("name")
        if given is not None and (given != self.name or not NAME.fullmatch(given)):
            self._fault(["name"], repr(given), f"the name of its folder, {shown(self.name)!r}")

    def _permissions(self) -> frozenset[Permission]:
        key = "capabilities" if self.form.shape == "A" else "permissions"
        return frozenset(map(Permission, self.document.get(key, [Permission.ANALYSIS])))

    def _op_policy(self) -> dict[str, tuple[str, ...]] | None:
        given: Mapping[str, list[str]] | None = self.document.get("op_policy")
        return None if given is None else {op: tuple(needs) for op, needs in given.items()}

    def _run(self) -> dict[str, Capability]:
        """The capability of shape A."""
        timeout_ms = self.document.get("timeout_ms")
        capability = Capability(
            name=RUN,
            runner="proc",
            timeout_s=self._default_timeout_s if timeout_ms is None else timeout_ms / 1000,
            phases=self._phases,
            memory=self._memory(self.document, ()),
            description=self.document.get("description", ""),
            argv=self._split_entrypoint(),
        )
        return {RUN: capability}

    def _split_entrypoint(self) -> tuple[str, ...]:
        text: str | None = self.document.get("entrypoint")
        if text is None:
            return ()
        try:
            argv = tuple(shlex.split(text))
        except ValueError as error:
            self._fault(["entrypoint"], f"{text!r} ({error})", "a command with closed quotes")
            return ()
        if not argv or not argv[0]:
            self._fault(["entrypoint"], repr(text), "a command that names a program")
        return argv

    def _capabilities(self) -> dict[str, Capability]:
        """The capabilities of shapes B and native, under their names without the overlay's before them."""
        self._check_entrypoints()
        found: dict[str, Capability] = {}
        for written, given in self._given_capabilities().items():
            if len(self.faults) > MAX_FAULTS:
                break
            name = local_name(self.name, written)
            at = ("capabilities", written)
            if not CAPABILITY_NAME.fullmatch(name):
                self._fault(at, repr(written), "a name of letters, digits, _, - and . (at most 128)")
            if name in found:
                self._fault(at, f"{name!r} a second time", "each capability once")
            found[name] = self._capability(name, given, at)
        return found

    def _check_entrypoints(self) -> None:
        for kind in RUNNERS:
            command = self._entrypoint(kind).get("command")
            if command == [] or (command and not command[0]):
                self._fault(["entrypoints", kind, "command", 0], repr(""), "the name of a program")
        url = self._entrypoint("http").get("base_url")
        if url is not None and not _is_base_url(url):
            allowed = "an http:// or https:// URL with a host, without query or fragment"
            self._fault(["entrypoints", "http", "base_url"], repr(url), allowed)

    def _capability(self, name: str, given: Mapping[str, Any], at: tuple[str, ...]) -> Capability:
        rights = given.get("rights", {})
        network = rights.get("network", True)
        concurrency = given.get("concurrency")
        return Capability(
            name=name,
            runner=given.get("runner", ""),
            timeout_s=float(given.get("timeout_s", self._default_timeout_s)),
            phases=self._subset(given, at),
            memory=self._memory(given, at),
            description=given.get("description", ""),
            **self._target(given, at),
            method=given.get("method", "POST"),
            input_schema=self._schema(given, at, "input_schema"),
            output_schema=self._schema(given, at, "output_schema"),
            degradation=Degradation(
                **_known_members(given.get("degradation", {}), "max_fraction", "disable_nonessential")
            ),
            concurrency=None if concurrency is None else int(concurrency),
            cost_cents=given.get("cost_cents", 0.0),
            idempotent=given.get("idempotent", False),
            read_paths=self._paths(rights, at, "read"),
            write_paths=self._written(rights, at),
            network=network if isinstance(network, bool) else tuple(map(int, network)),
        )

    def _target(self, given: Mapping[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
        """`argv` or `url`: that of the entrypoint which the runner takes; another runner takes the one there is."""
        runner = given.get("runner")
        if runner is None:
            return {}
        if runner not in self._runners:
            near = difflib.get_close_matches(runner, self._runners, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self._fault([*at, "runner"], repr(runner), f"one of {', '.join(self._runners)}{hint}")
            return {}
        kind = runner if runner in RUNNERS else "proc" if self._has_entrypoint("proc") else "http"
        if not self._has_entrypoint(kind):
            allowed = f"a value, since {json_path(*at)} has the runner {runner!r}"
            self._fault(["entrypoints", kind], "nothing", allowed)
        entrypoint = self._entrypoint(kind)
        path: str | None = given.get("path")
        if kind == "http":  # the url of a service that the bus starts is the path alone
            return {"url": _join(entrypoint.get("base_url", ""), path or "") or "/"}
        return {"argv": (*entrypoint.get("command", ()), *([path] if path else ()), STDIN_FLAG)}

    def _has_entrypoint(self, kind: str) -> bool:
        """Whether it was given, however badly: what is wrong with it was said already."""
        given = self.form.given.get("entrypoints")
        return kind in given if isinstance(given, dict) else True

    def _memory(self, given: Mapping[str, Any], at: tuple[str, ...]) -> MemoryProfile:
        if "memory" in given and "default_profile" in given:
            self._fault([*at, "default_profile"], repr(given["default_profile"]), "nothing where memory is given")
        key = "memory" if "memory" in given else "default_profile"
        text = given.get(key, DEFAULT_PROFILE)
        try:
            return self._profile_of(text)
        except runes.RuneError as error:
            self.is_lasting &= error.is_lasting
            if key in given:
                self._fault([*at, key], repr(text), error.detail)
            else:
                self._broken_default = error.detail
            return runes.resolve(DEFAULT_PROFILE)

    def _subset(self, given: Mapping[str, Any], at: tuple[str, ...]) -> tuple[Phase, ...]:
        chosen = tuple(dict.fromkeys(map(Phase, given.get("phases", self._phases))))
        beyond = [phase for phase in chosen if phase not in self._phases]
        if beyond and self.document.get("phases") == self.form.given.get("phases"):
            self._fault([*at, "phases"], ", ".join(beyond), f"phases of the overlay: {', '.join(self._phases)}")
        return chosen

    def _schema(self, given: Mapping[str, Any], at: tuple[str, ...], key: str) -> Mapping[str, Any] | None:
        schema: Mapping[str, Any] | None = given.get(key)
        if schema is not None:
            self.faults += schema_faults(schema, json_path(*at, key))
        return schema

    def _paths(self, rights: Mapping[str, Any], at: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Absolute, and without links: who reads the manifest is to see where they lead."""
        return tuple(self._path(text, [*at, "rights", key, index]) for index, text in enumerate(rights.get(key, ())))

    def _written(self, rights: Mapping[str, Any], at: tuple[str, ...]) -> tuple[str, ...]:
        """The paths to write to. The manifest is not among them: an overlay would give itself what it then asks for.

        Nor is what the manifest is a link to, nor the folder where the link could be another.
        """
        paths = self._paths(rights, at, "write")
        manifests = (os.path.realpath(self.folder / FILE), f"{os.path.realpath(self.folder)}/{FILE}")
        for index, (text, path) in enumerate(zip(rights.get("write", ()), paths, strict=True)):
            if any(_is_within(manifest, path) for manifest in manifests):
                self._fault([*at, "rights", "write", index], repr(text), "a path that has not the manifest in it")
        return paths

    def _path(self, text: str, at: list[str | int]) -> str:
        if text.startswith("~"):
            self._fault(at, repr(text), "a path without ~, absolute or from the folder on")
        plain = os.path.normpath(self.folder / text)
        try:
            real = plain if _is_of_kernel(plain) else os.path.realpath(plain)
        except OSError as error:  # a link on the way that this user may not read
            self._fault(at, f"{text!r} ({error.strerror})", "a path that the bus can follow")
            return plain
        if _is_of_kernel(real):
            self._fault(at, repr(text), f"a path outside {' and '.join(_OF_KERNEL)}")
        elif real != plain and not (text.startswith("/") or _is_within(real, str(self.folder))):
            self._fault(at, f"{text!r}, a link to {shown(real)!r}", "the path that it leads to")
        elif real != plain:
            self._links.append((at, text, plain))
        return real

    def _check_links(self, capabilities: Mapping[str, Capability]) -> None:
        """No right goes by a link below what the overlay may write to: it could lead the next reading anywhere."""
        own = {Path(path) for offered in capabilities.values() for path in offered.write_paths}
        for at, text, plain in self._links:
            if resolve(Path(plain), own) is None:
                self._fault(at, f"{text!r}, by a link that the overlay may change", "a path without it")


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_of_kernel(path: str) -> bool:
    return any(_is_within(path, place) for place in _OF_KERNEL)


def _known_members(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _is_base_url(text: str) -> bool:
    try:
        url = urllib.parse.urlsplit(text)
        plain = text.isprintable() and " " not in text and not url.query and not url.fragment
        return plain and url.scheme in {"http", "https"} and _is_host(url.hostname or "") and url.port != 0
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Whether it is an IP address or a host name, of letters of any script. Raises `ValueError` for some that are not.

    RFC 1123 section 2.1, and `_` beside its characters, which names in private networks have.
    """
    if ":" in text:
        ipaddress.IPv6Address(text)
    return ":" in text or (_HOST_NAME.fullmatch(text) is not None and bool(text.encode("idna")))


def _cut(text: str, limit: int) -> str:
    """A text that can be written, cut to a length that fits a message."""
    return shown(text if len(text) <= limit else text[: limit - 1] + "…")


def _join(base_url: str, path: str) -> str:
    return f"{base_url.rstrip('/')}/{path.lstrip('/')}" if path else base_url
