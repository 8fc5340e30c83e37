"""Tokens of callers, in `<state>/tokens.json`: who may call what, how often, until when. Never the tokens themselves.

A token is `aal_` and 256 random bits in base64url; the file has its SHA-256. So many random bits need neither salt nor
a slow hash: nobody guesses them, and who reads the file can make no call with it. An expired token still counts as one:
a bus whose last token expires is closed, not open.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

from bus.errors import OperatorError
from bus.model import Phase
from bus.private_file import PrivateFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PREFIX = "aal_"
FILE = "tokens.json"
_RANDOM_BYTES = 32
_SHOWN = 80
"""Characters of a wrong value that its refusal repeats."""

Scope = Literal["invoke", "read-ledger", "replay", "admin"]
"""What a token is good for: calls; reading records; running them again; all that changes or shows the machine."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

Unit = Literal["s", "m", "h"]
_SECONDS: dict[Unit, int] = {"s": 1, "m": 60, "h": 3600}
_SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_GLOB = re.compile(r"[a-z0-9_*?\[\]!-]{1,128}")
_RATE = re.compile(r"([1-9][0-9]{0,6})/([smh])")
_SPAN = re.compile(r"([1-9][0-9]{0,4})([hdw])")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MEMBERS = {"name", "sha256", "overlays", "phases", "scopes", "rate", "created", "expires"}


_AT_ONCE = 10.0


class Rate(NamedTuple):
    """So many calls in a second, a minute or an hour."""

    calls: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.calls}/{self.unit}"

    @property
    def per_s(self) -> float:
        return self.calls / _SECONDS[self.unit]

    @property
    def burst(self) -> float:
        """Calls that may come at once: those of a second, or ten where that is less, and at most all of them."""
        return min(float(self.calls), max(_AT_ONCE, self.per_s))


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `overlays` are shell patterns of names; `rate` None is any, `expires` None is never."""

    name: str
    digest: bytes = field(repr=False)
    overlays: tuple[str, ...]
    phases: tuple[Phase, ...]
    scopes: tuple[Scope, ...]
    rate: Rate | None
    created: datetime
    expires: datetime | None

    @classmethod
    def read(cls, document: Any) -> Self:  # noqa: ANN401
        """Of its JSON. Raises `ValueError`.

        A member that is not known is refused: it may be a limit, and a token without it would allow more.
        """
        if not isinstance(document, dict) or document.keys() != _MEMBERS:
            raise ValueError(f"a token without exactly the members {', '.join(sorted(_MEMBERS))}")
        rate, expires = document["rate"], document["expires"]
        return cls(
            read_name(document["name"]),
            _read_digest(document["sha256"]),
            read_overlays(document["overlays"]),
            read_phases(document["phases"]),
            read_scopes(document["scopes"]),
            None if rate is None else read_rate(rate),
            _read_moment(document["created"]),
            None if expires is None else _read_moment(expires),
        )

    def document(self) -> dict[str, Any]:
        return self.shown() | {"sha256": self.digest.hex()}

    def shown(self) -> dict[str, Any]:
        """What people and programs are shown of it."""
        return {
            "name": self.name,
            "overlays": list(self.overlays),
            "phases": [phase.value for phase in self.phases],
            "scopes": list(self.scopes),
            "rate": self.rate and str(self.rate),
            "created": rfc3339(self.created),
            "expires": self.expires and rfc3339(self.expires),
        }


class TokenFile:
    """The form of the file: `{"tokens": [...]}`."""

    name = FILE
    allowed = '{"tokens": [as aal token create writes them]}'
    hint = "Mend the file. Nobody is let in meanwhile; without the file there are no tokens, and none is asked for."

    def empty(self) -> tuple[Token, ...]:
        return ()

    def read(self, document: Any) -> tuple[Token, ...]:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"tokens"} or not isinstance(document["tokens"], list):
            raise ValueError("something else")
        tokens = tuple(map(Token.read, document["tokens"]))
        if len({token.name for token in tokens}) != len(tokens):
            raise ValueError("two tokens of one name")
        return tokens

    def document(self, held: tuple[Token, ...]) -> object:
        return {"tokens": [token.document() for token in held]}


class Tokens:
    """The tokens of one state folder. Each method raises `SettingError` where the file makes no sense."""

    def __init__(self, state: Path) -> None:
        self._file = PrivateFile(state, TokenFile())

    def all(self) -> tuple[Token, ...]:
        """Those that there are now, the expired ones too, in the order of their making."""
        return self._file.get()

    def create(
        self,
        name: str,
        *,
        overlays: tuple[str, ...],
        phases: tuple[Phase, ...],
        scopes: tuple[Scope, ...],
        rate: Rate | None = None,
        expires: datetime | None = None,
    ) -> tuple[Token, str]:
        """A new token, and its text, which is nowhere else. Raises `OperatorError` where the name is taken."""
        text = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        created = datetime.now(UTC).replace(microsecond=0)
        token = Token(name, digest_of(text.encode()), overlays, phases, scopes, rate, created, expires)

        def add(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
            if any(other.name == name for other in tokens):
                hint = f"aal token revoke {name} ends it."
                raise OperatorError("ERR_EXISTS", f"there is already a token {name!r}", hint=hint)
            return (*tokens, token)

        self._file.change(add)
        return token, text

    def revoke(self, name: str) -> tuple[Token, ...]:
        """End a token; gives those that are left. Raises `OperatorError` where there is none of this name."""

        def drop(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
            left = tuple(token for token in tokens if token.name != name)
            if len(left) == len(tokens):
                hint = "aal token list shows those that there are."
                raise OperatorError("ERR_NOT_FOUND", f"there is no token {name!r}", hint=hint)
            return left

        return self._file.change(drop)


def digest_of(text: bytes) -> bytes:
    """What is kept of a token: the SHA-256 of all of its text."""
    return hashlib.sha256(text).digest()


def rfc3339(moment: datetime) -> str:
    """A moment of UTC, as `2026-01-31T00:00:00Z`."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def read_name(text: Any) -> str:  # noqa: ANN401
    """The name of a token. Raises `ValueError`, as the following do."""
    return _matching(_NAME, text, f"a name that matches {_NAME.pattern}")[0]


def read_overlays(texts: Any) -> tuple[str, ...]:  # noqa: ANN401
    return tuple(_matching(_GLOB, text, "a pattern of overlays' names")[0] for text in _some(texts, "overlays"))


def read_phases(texts: Any) -> tuple[Phase, ...]:  # noqa: ANN401
    wanted = _members(texts, "phases", Phase)
    return tuple(phase for phase in Phase if phase in wanted)


def read_scopes(texts: Any) -> tuple[Scope, ...]:  # noqa: ANN401
    wanted = _members(texts, "scopes", SCOPES)
    return tuple(scope for scope in SCOPES if scope in wanted)


def read_rate(text: Any) -> Rate:  # noqa: ANN401
    """As `10/s`, `600/m` or `1000/h`."""
    found = _matching(_RATE, text, "a rate as 10/s, 600/m or 1000/h")
    return Rate(int(found[1]), found[2])  # type: ignore[arg-type]  # the pattern has just these letters


def read_expiry(text: str, now: datetime) -> datetime:
    """A span from now, as `12h`, `30d` or `8w`, or a date or time as ISO 8601 has it, in UTC where it says no zone."""
    allowed = "a time to come, as 12h, 30d, 8w, 2030-12-31 or 2030-12-31T18:00:00Z"
    try:
        if span := _SPAN.fullmatch(text):
            moment = now + int(span[1]) * _SPANS[span[2]]
        else:
            moment = datetime.fromisoformat(text)
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: beyond the year 9999, or before the year 1
        raise ValueError(f"{_cut(text)} is not {allowed}") from None
    if moment <= now:
        raise ValueError(f"{rfc3339(moment)} is over; give {allowed}")
    return moment.replace(microsecond=0)


def _read_digest(text: Any) -> bytes:  # noqa: ANN401
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError("something else than a SHA-256 in hex")  # it may be the token itself, which is not repeated
    return bytes.fromhex(text)


def _read_moment(text: Any) -> datetime:  # noqa: ANN401
    if not isinstance(text, str):
        raise ValueError("a time that is not a text")  # noqa: TRY004  # who reads the file catches the one
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment.astimezone(UTC)


def _matching(pattern: re.Pattern[str], text: Any, allowed: str) -> re.Match[str]:  # noqa: ANN401
    found = pattern.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{_cut(text)} is not {allowed}")
    return found


def _some(texts: Any, what: str) -> Sequence[Any]:  # noqa: ANN401
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{what} that are no list of one or more")
    return texts


def _members(texts: Any, what: str, known: Iterable[str]) -> Sequence[str]:  # noqa: ANN401
    choices = list(known)
    for text in (wanted := _some(texts, what)):
        if text not in choices:
            raise ValueError(f"{_cut(text)} is not one of {', '.join(choices)}")
    return wanted


def _cut(value: Any) -> str:  # noqa: ANN401
    return repr(str(value)[:_SHOWN])
