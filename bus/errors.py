"""The error tree. What is refused before anything ran is a `BusError`; what a started overlay does is an `Outcome`.

    BusError
      RequestError       the request's form: JSON, keys, phase, size
      NotFoundError      overlay, capability, record, address
      DeniedError        phase, permission, disabled, veto, secret, what the kernel cannot hold
      CallerError        who calls: not known, not allowed, too often; carries Retry-After
      InputError         the payload against the capability's schema, a bad rune
      OverloadError      queue, stress, shutdown, ledger; carries Retry-After
      DeadlineError      the deadline passed in the queue
      ReplayError        a line that cannot be replayed
      SettingError       a setting that cannot be
      OperatorError      what an operator asked for cannot be done

Every code's category, HTTP status, message and suggested actions stand in `schemas/error_catalog.json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from bus import resources

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class CodeEntry:
    """What the catalogue says of one code. `http_status` is that of an answer that carries it."""

    code: str
    http_status: int
    category: Literal["TRANSIENT", "PERMANENT", "RESOURCE", "PERMISSION", "VALIDATION"]
    retryable: bool
    message: str
    actions: tuple[str, ...]

    @property
    def hint(self) -> str | None:
        return self.actions[0] if self.actions else None


def _read_catalogue() -> dict[str, CodeEntry]:
    entries: dict[str, Any] = resources.load_json("schemas/error_catalog.json")
    return {
        code: CodeEntry(code, e["http_status"], e["category"], e["retryable"], e["message"], tuple(e["actions"]))
        for code, e in entries.items()
    }


CATALOGUE = _read_catalogue()


def entry(code: str) -> CodeEntry:
    """The catalogue's entry; an overlay's own code has that of ERR_OVERLAY_FAILED."""
    return CATALOGUE.get(code) or CATALOGUE["ERR_OVERLAY_FAILED"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a document: where (JSON path, as `$.phases[0]`), what was found, what is allowed."""

    path: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, allowed: {self.allowed}"


def say(faults: Iterable[Fault]) -> str:
    """Faults as one line for people."""
    return "; ".join(map(str, faults))


class BusError(Exception):
    """A refusal. `detail` names the thing, the value found and what is allowed.

    Without a `hint` the catalogue's first suggested action stands in.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        faults: Sequence[Fault] = (),
        hint: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.entry = CATALOGUE[code]
        self.code = code
        self.detail = detail
        self.faults = tuple(faults)
        self.hint = hint or self.entry.hint
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error for a program: what every error answer of the HTTP side has, and `--json` on the command line."""
        return {
            "ok": False,
            "error": self.detail,
            "code": self.code,
            "category": self.entry.category,
            "message": self.entry.message,
            "detail": self.detail,
            "hint": self.hint,
            "retryable": self.entry.retryable,
            "faults": [asdict(fault) for fault in self.faults],
        }


class RequestError(BusError):
    """The request's form is wrong."""


class NotFoundError(BusError):
    """What was named does not exist."""


class DeniedError(BusError):
    """The call may not be made."""


class CallerError(BusError):
    """Who calls is not known, or may not do this, or does it too often."""


class InputError(BusError):
    """The payload or the profile does not fit."""


class OverloadError(BusError):
    """There is no room now."""


class DeadlineError(BusError):
    """The deadline passed before the call could start."""


class ReplayError(BusError):
    """The line cannot be replayed."""


class SettingError(BusError):
    """A setting has a value that it cannot have."""


class OperatorError(BusError):
    """What an operator asked for cannot be done."""
