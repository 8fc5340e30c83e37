"""Settings: one table (name, default, help) for the code, `aal config`, the CLI's help and the README.

Sources, the later wins: default, `aal.toml`, environment (`AAL_*`), command line. A value that cannot be, or a name
that is not in the table, stops the start; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from bus.errors import Fault, SettingError
from bus.model import Phase
from runners.base import SandboxMode  # noqa: TC001  # its members are read at run time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runners.base import Tier

PREFIX = "AAL_"
FILE = "aal.toml"
TOKEN = "AAL_TOKEN"  # noqa: S105  # a variable's name
"""Of the commands that ask a server: the token they send. No setting, as a setting is shown by `aal config`."""

_NAME_MAX = 255
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _setting(default: Any, help: str, check: Callable[[Any], bool] = lambda _: True, allowed: str = "") -> Any:  # noqa: A002, ANN401
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "allowed": allowed})


def _number(default: float, help: str, low: float, high: float) -> Any:  # noqa: A002, ANN401
    return _setting(default, help, lambda value: low <= value <= high, f"{low} to {high}")


def _list(help: str, member: str, allowed: str) -> Any:  # noqa: A002, ANN401
    """A text of members separated by commas, each of which the pattern `member` matches; none by default."""
    pattern = re.compile(member)
    return _setting("", help, lambda value: all(map(pattern.fullmatch, _members(value))), allowed)


def _folder(help: str) -> Any:  # noqa: A002, ANN401
    """A path, for one folder and nothing else in it; or none."""
    return _setting("", help, _is_path, "a path of a folder for nothing else, or nothing")


def _is_path(value: str) -> bool:
    try:
        return _path(Path(value).expanduser()) is not None
    except RuntimeError:  # ~ of a user that is not there
        return False


def _members(value: str) -> tuple[str, ...]:
    return tuple(member.strip() for member in value.split(",") if member.strip())


_HOST = r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]"


@dataclass(frozen=True, slots=True)
class DeclaredSecret:
    """A secret of `aal.toml`: the environment variable that holds its value, and the overlays that may have it."""

    name: str
    env: str
    overlays: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, checked. Paths are absolute once `load` has made them.

    No settings are `file`, where `aal.toml` is or would be, and `secrets`, which come from it alone.
    """

    host: str = _setting("127.0.0.1", "address to listen on; another than loopback once there is a token")
    port: int = _number(8000, "port to listen on; 0 takes a free one", 0, 65535)
    overlays: Path = _setting(Path("overlays"), "folder of the overlays")
    logs: Path = _setting(Path("logs"), "folder of the ledger")
    state: Path = _setting(Path(".aal"), "folder of the bus's own state")
    profiles: Path = _setting(Path("profiles"), "folder of your own memory profiles, each a file NAME.rune")
    slots: int = _number(64, "calls that run at once", 1, 4096)
    admission: Literal["memory", "slots"] = _setting(
        "memory", "what a call needs to start: a slot and its memory, or a slot alone"
    )
    memory_mb: int = _number(
        0, "memory that overlays may have altogether, in MiB; 0 is what the machine or the cgroup has", 0, 1_000_000_000
    )
    eviction_retries: int = _number(
        3, "how often a call that was ended to free memory is run again by itself, where that does no harm", 0, 100
    )
    queue_limit: int = _number(256, "calls that wait at once before one is refused", 0, 100_000)
    timeout_s: float = _number(30.0, "timeout of a capability that declares none, in seconds", 0.001, 86_400)
    kill_grace_s: float = _number(2.0, "seconds between TERM and KILL of a call that is over", 0, 60)
    helper_idle_s: float = _number(
        60.0, "seconds that a process which starts programs, or a worker, is kept without a call", 0.1, 86_400
    )
    drain_s: float = _number(10.0, "seconds that running calls get at shutdown", 0, 3600)
    max_body_mb: float = _number(16, "largest request body, in MiB", 0.001, 1024)
    max_output_mb: float = _number(16, "largest output of an overlay, in MiB", 0.001, 1024)
    pass_env: str = _setting("", "names of further environment variables that overlays see, separated by commas")
    fsync: Literal["always", "batch", "never"] = _setting(
        "batch", "when a ledger line is on the disk: each, each group, or as the kernel likes"
    )
    ledger_segment_mb: float = _number(
        64,
        "size at which the ledger's file is closed, compressed and followed by another, in MiB; 0 is never",
        0,
        1_048_576,
    )
    degrade: Literal["progressive", "all"] = _setting(
        "progressive", "degradation steps under stress: more as it rises, or all at once"
    )
    stress_period_s: float = _number(0.5, "seconds between two samples of the stress", 0.01, 60)
    dev_log_payload: bool = _setting(
        False, "store payloads and results in the ledger, which replay needs; read per call"
    )
    sandbox: SandboxMode = _setting(
        "best-effort", "a call that the kernel cannot hold to its rights: refuse it, run it and say so, hold nothing"
    )
    trusted: str = _list(
        "overlays whose services get CLEAR and SEAL calls though AAL_SANDBOX=enforce, separated by commas",
        r"[a-z0-9][a-z0-9_-]*",
        "names of overlays",
    )
    cgroup: Literal["auto", "off"] = _setting(
        "auto",
        "whether the kernel holds calls to HARD, where the bus has a cgroup (v2) of its own; else it looks at them",
    )
    scratch_local: str = _folder("folder for the scratch of calls of tier LOCAL; memory where empty")
    scratch_extended: str = _folder("the same of tier EXTENDED; scratch in AAL_STATE where empty")
    scratch_cold: str = _folder("the same of tier COLD, as on a large slow disk; scratch in AAL_STATE where empty")
    scratch_mb: int = _number(256, "what a call of tier LOCAL may have in its scratch folder, in MiB", 1, 1_048_576)
    scratch_extended_mb: int = _number(1024, "the same of tier EXTENDED", 1, 1_048_576)
    scratch_cold_mb: int = _number(4096, "the same of tier COLD", 1, 1_048_576)
    max_processes: int = _number(256, "processes and threads that a call may have at once", 1, 4_194_304)
    local_phases: str = _list(
        "phases of calls without a token, as long as there is none, separated by commas; all where empty",
        "|".join(Phase),
        "names of phases",
    )
    hosts: str = _list("further names that clients may call the server by, separated by commas", _HOST, "host names")
    origins: str = _list(
        "web origins whose pages may call, separated by commas", rf"https?://({_HOST})(:\d+)?", "as https://example.org"
    )
    targets: str = _list(
        "hosts that http capabilities may be on, separated by commas; any where empty",
        rf"({_HOST})(:\d+)?",
        "host names, each with or without a port",
    )
    client_timeout_s: float = _number(30.0, "seconds that a client may take to send its request", 0.1, 3600)
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "what the server's own log shows")
    secrets: tuple[DeclaredSecret, ...] = ()
    file: Path = Path(FILE)

    @property
    def ledger(self) -> Path:
        return self.logs / "provenance.jsonl"

    @property
    def ledger_segment_bytes(self) -> int:
        return math.ceil(self.ledger_segment_mb * 2**20)

    @property
    def overlay_logs(self) -> Path:
        """The folder of what overlays write to stderr, and services to either."""
        return self.logs / "overlays"

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_output_bytes(self) -> int:
        return int(self.max_output_mb * 2**20)

    def state_of(self, overlay: str) -> Path:
        """The folder that an overlay keeps for itself."""
        return self.state / "state" / overlay

    @property
    def scratch(self) -> Path:
        """The folder of the scratch folders of calls, where no other is set for their tier."""
        return self.state / "scratch"

    def scratch_set(self) -> dict[Tier, Path]:
        """The folders that are set for tiers, absolute where the settings are those of a working folder."""
        given: dict[Tier, str] = {
            "LOCAL": self.scratch_local,
            "EXTENDED": self.scratch_extended,
            "COLD": self.scratch_cold,
        }
        return {tier: self.file.parent / Path(path).expanduser() for tier, path in given.items() if path}

    def listed(self, name: str) -> tuple[str, ...]:
        """The members of a setting that is a list separated by commas, as `hosts`."""
        return _members(getattr(self, name))

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Row:
    """One setting for people: its value and the source that the value came from."""

    name: str
    env: str
    default: Any
    help: str
    allowed: str
    value: Any = None
    source: str = "default"


_TABLE = {f.name: f for f in dataclasses.fields(Settings) if f.metadata}
_TYPES = get_type_hints(Settings)


def table() -> list[Row]:
    """Every setting with its default, in the order of the README's table."""
    return [
        Row(f.name, PREFIX + f.name.upper(), f.default, f.metadata["help"], _allowed(f.name)) for f in _TABLE.values()
    ]


def load(
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a working folder (default: the current one). Raises `SettingError` with every fault at once."""
    return explain(folder, env, overrides)[0]


def explain(
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Settings, list[Row]]:
    """As `load`, and beside it where each value came from."""
    folder = (folder or Path.cwd()).absolute()
    faults: list[Fault] = []
    chosen: dict[str, tuple[Any, str]] = {}
    file = _document(folder / FILE, faults)
    secrets = _secrets(file.pop("secrets", {}), faults)
    for source, given in (
        (FILE, {name: value for name, value in file.items() if _is_known(name, name, FILE, faults)}),
        ("environment", _from_env(os.environ if env is None else env, faults)),
        ("command line", {k: v for k, v in (overrides or {}).items() if v is not None}),
    ):
        for name, raw in given.items():
            value = _read(name, raw, source, faults)
            if value is not None:
                chosen[name] = (value, source)
    if faults:
        raise SettingError("ERR_SETTING", "; ".join(map(str, faults)), faults=faults)
    values = {name: value for name, (value, _) in chosen.items()}
    for name in ("overlays", "logs", "state", "profiles"):
        values[name] = folder / values.get(name, _default(name))
    settings = Settings(**values, secrets=secrets, file=folder / FILE)
    rows = [
        dataclasses.replace(row, value=getattr(settings, row.name), source=chosen.get(row.name, ("", "default"))[1])
        for row in table()
    ]
    return settings, rows


def stores_payload(settings: Settings) -> bool:
    """Whether the next record holds its payload. The environment is asked each time, so that it can be switched."""
    raw = os.environ.get("AAL_DEV_LOG_PAYLOAD")
    return settings.dev_log_payload if raw is None else raw.lower() in _TRUE


_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def _default(name: str) -> Any:  # noqa: ANN401
    return _TABLE[name].default


def _document(path: Path, faults: list[Fault]) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, no TOML, or a number too long to read
        faults.append(Fault(path.name, str(error), "a readable TOML file"))
        return {}
    return document


def _secrets(given: Any, faults: list[Fault]) -> tuple[DeclaredSecret, ...]:  # noqa: ANN401
    """Those of the table `[secrets]`, each `NAME = {env = "VARIABLE", overlays = ["name", ...]}`."""
    found = []
    for name, secret in given.items() if isinstance(given, dict) else [("", given)]:
        if _is_secret(name, secret):
            found.append(DeclaredSecret(name, secret["env"], tuple(secret["overlays"])))
        else:
            allowed = 'NAME = {env = "VARIABLE", overlays = ["name", ...]}'
            faults.append(
                Fault(f"{FILE}: secrets{name and '.' + name}", "something else", allowed)
            )  # it may be a value
    return tuple(found)


def _is_secret(name: str, secret: Any) -> bool:  # noqa: ANN401
    return (
        _VARIABLE.fullmatch(name) is not None
        and isinstance(secret, dict)
        and secret.keys() == {"env", "overlays"}
        and isinstance(secret["env"], str)
        and isinstance(secret["overlays"], list)
        and all(isinstance(overlay, str) for overlay in secret["overlays"])
    )


def _from_env(env: Mapping[str, str], faults: list[Fault]) -> dict[str, Any]:
    given = {name: value for name, value in env.items() if name.startswith(PREFIX) and name != TOKEN}
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in given.items()
        if _is_known(name.removeprefix(PREFIX).lower(), name, "environment", faults)
    }


def _is_known(name: str, spelled: str, source: str, faults: list[Fault]) -> bool:
    if name in _TABLE:
        return True
    near = difflib.get_close_matches(name, _TABLE, n=1)
    prefix = PREFIX if spelled.startswith(PREFIX) else ""
    known = f"{prefix}{near[0].upper() if prefix else near[0]}" if near else "the names that aal config shows"
    faults.append(Fault(f"{source}: {spelled}", "an unknown setting", known))
    return False


def _read(name: str, raw: Any, source: str, faults: list[Fault]) -> Any:  # noqa: ANN401
    """The typed value, or None after a fault was added."""
    field = _TABLE[name]
    try:
        value = _convert(raw, _TYPES[name])
    except (ValueError, TypeError, OverflowError, RuntimeError):  # RuntimeError: ~ of a user that is not there
        value = None
    if value is None or not field.metadata["check"](value):
        faults.append(Fault(f"{source}: {name}", _shown(raw), _allowed(name)))
        return None
    return value


def _shown(raw: Any) -> str:  # noqa: ANN401
    try:
        return repr(raw)
    except ValueError:  # Python spells no more digits than sys.get_int_max_str_digits()
        return "a number of thousands of digits"


def _allowed(name: str) -> str:
    """What a setting may be, for people."""
    if choices := get_args(_TYPES[name]):
        return "one of " + ", ".join(choices)
    return _TABLE[name].metadata["allowed"] or {bool: "true or false", Path: "a path"}.get(_TYPES[name], "a text")


def _convert(raw: Any, kind: type) -> Any:  # noqa: ANN401
    """`raw` as `kind`; a text is parsed, and a TOML value of another type is not bent into shape."""
    if isinstance(raw, str) and "\0" in raw:  # no path, no name and no address holds one
        return None
    if choices := get_args(kind):
        return raw if raw in choices else None
    if kind is bool:
        text = str(raw).lower()
        return True if text in _TRUE else False if text in _FALSE else None
    if kind is Path:
        return _path(Path(raw).expanduser()) if raw else None
    if isinstance(raw, bool) or (kind is str and not isinstance(raw, str)) or (kind is int and isinstance(raw, float)):
        return None
    return kind(raw)


def _path(path: Path) -> Path | None:
    """None where a name in it is longer than any file system of Linux takes."""
    return path if all(len(os.fsencode(name)) <= _NAME_MAX for name in path.parts) else None
