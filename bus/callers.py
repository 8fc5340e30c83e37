"""Who is calling, and what may they do: the token of a request -> a `Caller`.

As long as there is no token, whoever reaches the server may do everything, in the phases of `AAL_LOCAL_PHASES`: it
listens on loopback only, so that is everybody on this machine. From the first token on each request needs one, from
this machine too. Tokens that come, go or change are seen by the next request: the requests that are judged in one turn
of the event loop had all arrived before the first of them was, and share its look at the disk.
"""

from __future__ import annotations

import hmac
import math
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from bus.errors import CallerError, Fault, SettingError, say
from bus.model import Phase
from bus.schemas import show
from bus.tokens import SCOPES, Rate, Scope, Token, Tokens, digest_of
from runners.base import running_loop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from pathlib import Path

EVERY_OVERLAY = ("*",)

_BEARER = re.compile(rb"bearer +([A-Za-z0-9._~+/-]+=*) *", re.IGNORECASE)
"""RFC 6750 section 2.1; the name of the scheme in whatever case, as RFC 9110 section 11.1 has it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what that caller may do. `name` is the token's, None of one who needs none."""

    name: str | None
    overlays: tuple[str, ...]
    phases: tuple[Phase, ...]
    scopes: tuple[Scope, ...]
    rate: Rate | None = None

    def has_overlay(self, name: str) -> bool:
        """Whether the overlay, by its name, is one that the caller may call and is shown."""
        return self.overlays == EVERY_OVERLAY or any(fnmatchcase(name, pattern) for pattern in self.overlays)

    def require(self, scope: Scope) -> None:
        """Raises `CallerError` (403) without the scope."""
        if scope not in self.scopes:
            raise self._lacks(f"the scope {scope}", self.scopes)

    def require_call(self, overlay: str, phase: Phase) -> None:
        """Raises `CallerError` (403) where the overlay, by its name, or the phase is not the caller's."""
        if not self.has_overlay(overlay):
            raise self._lacks(f"the overlay {show(overlay)}", self.overlays)
        if phase not in self.phases:
            raise self._lacks(f"the phase {phase}", self.phases)

    def _lacks(self, what: str, has: Iterable[str]) -> CallerError:
        listed = ", ".join(has)
        if self.name is not None:
            return CallerError("ERR_FORBIDDEN", f"the token {self.name} does not have {what}; it has {listed}")
        detail = f"a call without a token does not have {what}; AAL_LOCAL_PHASES has {listed}"
        return CallerError("ERR_FORBIDDEN", detail, hint="Add it there, or make a token that has it: aal token create.")


class _Known(NamedTuple):
    """A token as requests are held against it. `expires_s` is of the clock of `time.time`."""

    digest: bytes
    expires_s: float
    caller: Caller


class _Bucket(NamedTuple):
    """Calls that a caller may make at once, as of a moment of the monotonic clock.

    `is_told`: a call that came too soon was written down since the last that was served.
    """

    calls: float
    at: float
    is_told: bool = False


class Callers:
    """The callers of one state folder.

    `local_phases` are those of calls that need no token, all where empty; with `needs_token` there are no such calls,
    as behind an address that others reach. `clock` is monotonic, in seconds, and `now_s` the time of day since the
    epoch. Raises `SettingError` for a phase that there is not.
    """

    def __init__(
        self,
        state: Path,
        *,
        local_phases: Iterable[str] = (),
        needs_token: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._tokens = Tokens(state)
        self._local = Caller(None, EVERY_OVERLAY, _read_phases(local_phases), SCOPES)
        self._needs_token = needs_token
        self._clock = clock
        self._now_s = now_s
        self._seen: tuple[Token, ...] = ()
        self._known: tuple[_Known, ...] = ()
        self._buckets: dict[str | None, _Bucket] = {}
        self._looked_in: asyncio.AbstractEventLoop | None = None

    def has_tokens(self) -> bool:
        """Whether there is a token, be it expired. Raises `SettingError` where the file of tokens makes no sense."""
        return bool(self._tokens.all())

    def identify(self, authorization: bytes | None) -> Caller:
        """Who sends the header `Authorization`, or none. It is not looked at where no token is needed.

        Raises `CallerError` (401), and `SettingError` where the file of tokens makes no sense: then nobody gets in.
        """
        known = self._known if self._looked_in is running_loop() is not None else self._look()
        if not known:
            return self._without_tokens()
        if authorization is None:
            raise CallerError("ERR_UNAUTHORIZED", "the request has no token")
        return self._holder(known, _bearer(authorization))

    def spend(self, caller: Caller) -> None:
        """Count one call of `caller`. Raises `CallerError` (429, with `retry_after_s`) where it comes too soon."""
        rate = caller.rate
        if rate is None:
            return
        now = self._clock()
        calls, at, _ = self._buckets.get(caller.name, _Bucket(rate.burst, now))
        calls = min(rate.burst, calls + (now - at) * rate.per_s)
        if calls < 1:
            wait_s = max(1, math.ceil((1 - calls) / rate.per_s))
            detail = f"the token {caller.name} may make {rate} calls; the next in {wait_s} s"
            raise CallerError("ERR_RATE_LIMITED", detail, retry_after_s=wait_s)
        self._buckets[caller.name] = _Bucket(calls - 1, now)

    def is_first_refusal(self, caller: Caller) -> bool:
        """Whether a call that `spend` has just refused is the first such since `caller` was served; no other is then.

        So that who comes too often leaves one line, and not as many as it sends.
        """
        bucket = self._buckets[caller.name]
        self._buckets[caller.name] = bucket._replace(is_told=True)
        return not bucket.is_told

    def _look(self) -> tuple[_Known, ...]:
        try:
            tokens = self._tokens.all()
        except SettingError as error:  # what is in the file is nothing for who has yet to be let in
            hint = "Nobody is let in. aal token list says what is wrong with the file."
            raise SettingError("ERR_SETTING", "the tokens of this bus cannot be read", hint=hint) from error
        if tokens is not self._seen:
            self._known = tuple(map(_known, tokens))
            self._seen = tokens
            names = {token.name for token in tokens}
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in names}
        if loop := running_loop():
            loop.call_soon(self._look_again)
            self._looked_in = loop
        return self._known

    def _look_again(self) -> None:
        self._looked_in = None

    def _without_tokens(self) -> Caller:
        if not self._needs_token:
            return self._local
        detail = "there is no token yet, and the server listens to others than this machine"
        raise CallerError("ERR_UNAUTHORIZED", detail, hint="aal token create makes one.")

    def _holder(self, known: Iterable[_Known], text: bytes) -> Caller:
        """The caller whose token it is. Each is compared, however soon one fits: the time it takes tells nothing."""
        digest, found = digest_of(text), None
        for one in known:
            if hmac.compare_digest(one.digest, digest):
                found = one
        if found is None:
            raise CallerError("ERR_UNAUTHORIZED", "the token is not known, or no longer")
        if found.expires_s <= self._now_s():
            raise CallerError("ERR_UNAUTHORIZED", f"the token {found.caller.name} has expired")
        return found.caller


def _known(token: Token) -> _Known:
    expires_s = math.inf if token.expires is None else token.expires.timestamp()
    return _Known(token.digest, expires_s, Caller(token.name, token.overlays, token.phases, token.scopes, token.rate))


def _bearer(authorization: bytes) -> bytes:
    found = _BEARER.fullmatch(authorization)
    if found is None:
        raise CallerError("ERR_UNAUTHORIZED", "the header Authorization is not of the form: Bearer TOKEN")
    return found[1]


def _read_phases(names: Iterable[str]) -> tuple[Phase, ...]:
    listed = list(names)
    known = list(Phase)
    faults = [Fault("local_phases", show(name), ", ".join(known)) for name in listed if name not in known]
    if faults:
        raise SettingError("ERR_SETTING", say(faults), faults=faults)
    return tuple(map(Phase, listed or known))
