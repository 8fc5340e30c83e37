"""Settings: one table (name, default, help) for the code, `aal config`, the CLI's help and the README.

Sources, the later wins: default, `aal.toml`, environment (`AAL_*`), command line. A value that cannot be, or a name
that is not in the table, stops the start; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from bus.errors import Fault, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX = "AAL_"
FILE = "aal.toml"
_NAME_MAX = 255


def _setting(default: Any, help: str, check: Callable[[Any], bool] = lambda _: True, allowed: str = "") -> Any:  # noqa: A002, ANN401
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "allowed": allowed})


def _number(default: float, help: str, low: float, high: float) -> Any:  # noqa: A002, ANN401
    return _setting(default, help, lambda value: low <= value <= high, f"{low} to {high}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, checked. Paths are absolute once `load` has made them."""

    host: str = _setting("127.0.0.1", "address to listen on; loopback only until callers have tokens")
    port: int = _number(8000, "port to listen on; 0 takes a free one", 0, 65535)
    overlays: Path = _setting(Path("overlays"), "folder of the overlays")
    logs: Path = _setting(Path("logs"), "folder of the ledger")
    state: Path = _setting(Path(".aal"), "folder of the bus's own state")
    slots: int = _number(64, "calls that run at once", 1, 4096)
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
    degrade: Literal["progressive", "all"] = _setting(
        "progressive", "degradation steps under stress: more as it rises, or all at once"
    )
    stress_period_s: float = _number(0.5, "seconds between two samples of the stress", 0.01, 60)
    dev_log_payload: bool = _setting(
        False, "store payloads and results in the ledger, which replay needs; read per call"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "what the server's own log shows")

    @property
    def ledger(self) -> Path:
        return self.logs / "provenance.jsonl"

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

    @property
    def pass_env_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.pass_env.split(",") if name.strip())

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


_TYPES = get_type_hints(Settings)


def table() -> list[Row]:
    """Every setting with its default, in the order of the README's table."""
    return [
        Row(f.name, PREFIX + f.name.upper(), f.default, f.metadata["help"], _allowed(f.name))
        for f in dataclasses.fields(Settings)
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
    for source, given in (
        (FILE, _from_file(folder / FILE, faults)),
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
    for name in ("overlays", "logs", "state"):
        values[name] = folder / values.get(name, _default(name))
    settings = Settings(**values)
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
    return next(f.default for f in dataclasses.fields(Settings) if f.name == name)


def _from_file(path: Path, faults: list[Fault]) -> dict[str, Any]:
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
    return {name: value for name, value in document.items() if _is_known(name, name, path.name, faults)}


def _from_env(env: Mapping[str, str], faults: list[Fault]) -> dict[str, Any]:
    given = {name: value for name, value in env.items() if name.startswith(PREFIX)}
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in given.items()
        if _is_known(name.removeprefix(PREFIX).lower(), name, "environment", faults)
    }


def _is_known(name: str, spelled: str, source: str, faults: list[Fault]) -> bool:
    if name in _TYPES:
        return True
    near = difflib.get_close_matches(name, _TYPES, n=1)
    prefix = PREFIX if spelled.startswith(PREFIX) else ""
    known = f"{prefix}{near[0].upper() if prefix else near[0]}" if near else "the names that aal config shows"
    faults.append(Fault(f"{source}: {spelled}", "an unknown setting", known))
    return False


def _read(name: str, raw: Any, source: str, faults: list[Fault]) -> Any:  # noqa: ANN401
    """The typed value, or None after a fault was added."""
    field = next(f for f in dataclasses.fields(Settings) if f.name == name)
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
    field = next(f for f in dataclasses.fields(Settings) if f.name == name)
    return field.metadata["allowed"] or {bool: "true or false", Path: "a path"}.get(_TYPES[name], "a text")


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
