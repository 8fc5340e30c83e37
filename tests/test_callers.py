"""Tokens and callers: who is let in, to what, how often; and nothing of a token is kept or told."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.callers import Caller, Callers
from bus.errors import CallerError, OperatorError, SettingError
from bus.model import Phase
from bus.tokens import SCOPES, Rate, Token, Tokens, read_expiry, read_overlays, read_rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Clock:
    """Seconds, as the test says."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path)


@pytest.fixture
def callers(tmp_path: Path) -> Callers:
    return Callers(tmp_path)


def make(tokens: Tokens, name: str = "ci", **limits: Any) -> str:
    """A token that allows everything but what `limits` say; gives the header that shows it."""
    values: dict[str, Any] = {"overlays": ("*",), "phases": tuple(Phase), "scopes": SCOPES}
    return f"Bearer {tokens.create(name, **values | limits)[1]}"


def who(callers: Callers, header: str | None) -> Caller:
    return callers.identify(None if header is None else header.encode())


def refused(callers: Callers, header: str | bytes | None) -> CallerError:
    with pytest.raises(CallerError) as refusal:
        callers.identify(header.encode() if isinstance(header, str) else header)
    assert (refusal.value.code, refusal.value.entry.http_status) == ("ERR_UNAUTHORIZED", 401)
    return refusal.value


# --- Without tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer aal_x", "nonsense"])
def test_without_tokens_everybody_may_do_everything_and_has_no_name(callers: Callers, header: str | None) -> None:
    caller = who(callers, header)
    assert caller.name is None
    for scope in SCOPES:
        caller.require(scope)
    for phase in Phase:
        caller.require_call("anything", phase)
    callers.spend(caller)


def test_without_tokens_the_phases_are_those_of_the_setting(tmp_path: Path) -> None:
    caller = who(Callers(tmp_path, local_phases=["CLEAR", "OPEN"]), None)
    caller.require_call("a", Phase.OPEN)
    with pytest.raises(CallerError, match="phase ASCEND; AAL_LOCAL_PHASES has CLEAR, OPEN") as refusal:
        caller.require_call("a", Phase.ASCEND)
    assert (refusal.value.code, refusal.value.entry.http_status) == ("ERR_FORBIDDEN", 403)
    assert "aal token create" in str(refusal.value.hint)


def test_a_phase_of_the_setting_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match='local_phases: found "OPN"'):
        Callers(tmp_path, local_phases=["OPEN", "OPN"])


def test_where_a_token_is_needed_nobody_gets_in_before_there_is_one(tmp_path: Path, tokens: Tokens) -> None:
    callers = Callers(tmp_path, needs_token=True)
    assert "there is no token yet" in refused(callers, None).detail
    refused(callers, "Bearer aal_x")
    header = make(tokens)
    assert who(callers, header).name == "ci"
    tokens.revoke("ci")
    refused(callers, header)


# --- With tokens -------------------------------------------------------------------------------------------------


def test_from_the_first_token_on_a_request_needs_one(callers: Callers, tokens: Tokens) -> None:
    assert (who(callers, None).name, callers.has_tokens()) == (None, False)
    header = make(tokens)
    assert "no token" in refused(callers, None).detail
    assert (who(callers, header).name, callers.has_tokens()) == ("ci", True)


def test_each_token_is_its_own_caller(callers: Callers, tokens: Tokens) -> None:
    headers = {name: make(tokens, name, scopes=("invoke",)) for name in ("a", "b", "c")}
    assert {name: who(callers, header).name for name, header in headers.items()} == {"a": "a", "b": "b", "c": "c"}


def test_a_revoked_token_is_refused_at_once(callers: Callers, tokens: Tokens) -> None:
    header, _ = make(tokens, "a"), make(tokens, "b")
    assert who(callers, header).name == "a"
    assert [token.name for token in tokens.revoke("a")] == ["b"]
    assert "not known" in refused(callers, header).detail


async def test_the_requests_of_one_turn_of_the_loop_share_a_look_and_those_of_the_next_have_their_own(
    callers: Callers, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, _ = make(tokens, "a"), make(tokens, "b")
    looks: list[tuple[Token, ...]] = []
    look = Tokens.all

    def counted(tokens: Tokens) -> tuple[Token, ...]:
        looks.append(look(tokens))
        return looks[-1]

    monkeypatch.setattr(Tokens, "all", counted)
    assert who(callers, header) is who(callers, header)
    assert len(looks) == 1
    tokens.revoke("a")
    await asyncio.sleep(0)
    refused(callers, header)
    assert len(looks) == 2


def test_once_the_last_token_is_revoked_none_is_needed_again(callers: Callers, tokens: Tokens) -> None:
    make(tokens)
    refused(callers, None)
    tokens.revoke("ci")
    assert who(callers, None).name is None


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic YWJj",
        b"Bearer a b",
        b"Bearer \xff\xfe",
        b"Bearer\taal_x",
        b"aal_x",
        b"Bearer aal_x, Bearer aal_y",
    ],
)
def test_a_header_of_another_form_is_refused_and_not_repeated(callers: Callers, tokens: Tokens, header: bytes) -> None:
    make(tokens)
    refusal = refused(callers, header)
    assert "Bearer TOKEN" in refusal.detail
    assert not header.removeprefix(b"Bearer").strip() or header.decode("latin-1") not in refusal.detail


@given(st.binary(max_size=200))
def test_no_header_lets_in_who_has_no_token(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    state = tmp_path_factory.getbasetemp() / "a-token"
    if not state.exists():
        make(Tokens(state))
    refused(Callers(state), header)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_may_be_in_any_case(callers: Callers, tokens: Tokens, scheme: str) -> None:
    header = make(tokens)
    assert who(callers, header.replace("Bearer", scheme)).name == "ci"


@pytest.mark.parametrize("change", [str.upper, str.lower, lambda text: text[:-1], lambda text: text + "A"])
def test_a_token_that_is_nearly_right_is_refused(callers: Callers, tokens: Tokens, change: Any) -> None:
    header = make(tokens)
    refused(callers, f"Bearer {change(header.removeprefix('Bearer '))}")


def test_a_token_is_held_against_all_that_there_are_by_its_digest_in_constant_time(
    callers: Callers, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = [make(tokens, name) for name in "abc"]
    compared: list[bytes] = []
    original: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert who(callers, headers[0]).name == "a"
    assert compared == [token.digest for token in tokens.all()]
    assert {len(digest) for digest in compared} == {32}


def test_a_token_ends_when_it_expires_and_the_bus_stays_closed(tmp_path: Path, tokens: Tokens) -> None:
    clock = Clock(NOW.timestamp() - 0.001)
    callers = Callers(tmp_path, now_s=clock)
    header = make(tokens, expires=NOW)
    assert who(callers, header).name == "ci"
    clock.now = NOW.timestamp()
    assert "token ci has expired" in refused(callers, header).detail
    refused(callers, None)


# --- What a token allows -----------------------------------------------------------------------------------------


def test_a_caller_without_the_scope_is_told_which_and_what_it_has(callers: Callers, tokens: Tokens) -> None:
    caller = who(callers, make(tokens, scopes=("invoke", "read-ledger")))
    caller.require("invoke")
    caller.require("read-ledger")
    for scope in ("replay", "admin"):
        with pytest.raises(CallerError) as refusal:
            caller.require(scope)
        assert refusal.value.detail == f"the token ci does not have the scope {scope}; it has invoke, read-ledger"
        assert (refusal.value.code, refusal.value.entry.http_status) == ("ERR_FORBIDDEN", 403)


@pytest.mark.parametrize(
    ("patterns", "overlay", "fits"),
    [
        (("*",), "psyfi", True),
        (("psyfi",), "psyfi", True),
        (("psyfi",), "psyfi2", False),
        (("fin-*", "psyfi"), "fin-a", True),
        (("fin-*",), "final", False),
        (("fin-?",), "fin-ab", False),
        (("[!a]*",), "abc", False),
        (("psyfi",), "PSYFI", False),
        (("psyfi",), "psyfi\n", False),
    ],
)
def test_the_patterns_of_a_token_say_which_overlays_it_may_call(
    callers: Callers, tokens: Tokens, patterns: tuple[str, ...], overlay: str, fits: bool
) -> None:
    caller = who(callers, make(tokens, overlays=read_overlays(list(patterns))))
    if fits:
        caller.require_call(overlay, Phase.OPEN)
        return
    with pytest.raises(CallerError, match="does not have the overlay") as refusal:
        caller.require_call(overlay, Phase.OPEN)
    assert refusal.value.detail.endswith(", ".join(patterns))


def test_a_phase_that_a_token_does_not_have_is_refused(callers: Callers, tokens: Tokens) -> None:
    caller = who(callers, make(tokens, phases=(Phase.OPEN, Phase.CLEAR)))
    caller.require_call("a", Phase.CLEAR)
    with pytest.raises(CallerError, match="token ci does not have the phase SEAL; it has OPEN, CLEAR"):
        caller.require_call("a", Phase.SEAL)


# --- Rates -------------------------------------------------------------------------------------------------------


def admitted(callers: Callers, caller: Caller) -> bool:
    try:
        callers.spend(caller)
    except CallerError as refusal:
        if refusal.code != "ERR_RATE_LIMITED":
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("rate", "burst", "in_ten_s"),
    [("40/s", 40, 400), ("1/s", 1, 10), ("60/m", 10, 10), ("600/m", 10, 100), ("1/h", 1, 0)],
)
def test_a_caller_has_the_calls_of_one_second_at_once_and_its_rate_in_the_long_run(
    tmp_path: Path, tokens: Tokens, rate: str, burst: int, in_ten_s: int
) -> None:
    clock = Clock(1000.0)
    callers = Callers(tmp_path, clock=clock)
    caller = who(callers, make(tokens, rate=read_rate(rate)))
    assert sum(admitted(callers, caller) for _ in range(3 * burst)) == burst
    count = 0
    for _ in range(160):
        clock.now += 1 / 16
        count += sum(admitted(callers, caller) for _ in range(3))
    assert in_ten_s - 1 <= count <= in_ten_s


def test_who_comes_too_often_is_told_when_to_come_again(tmp_path: Path, tokens: Tokens) -> None:
    clock = Clock()
    callers = Callers(tmp_path, clock=clock)
    caller = who(callers, make(tokens, rate=Rate(2, "m")))
    assert [admitted(callers, caller) for _ in range(2)] == [True, True]
    clock.now = 10.5
    with pytest.raises(CallerError, match="token ci may make 2/m calls; the next in 20 s") as refusal:
        callers.spend(caller)
    assert (refusal.value.code, refusal.value.entry.http_status) == ("ERR_RATE_LIMITED", 429)
    assert refusal.value.retry_after_s == 20
    clock.now = 30.5
    callers.spend(caller)


def test_of_the_refusals_in_a_row_one_is_the_first(tmp_path: Path, tokens: Tokens) -> None:
    clock = Clock()
    callers = Callers(tmp_path, clock=clock)
    a, b = (who(callers, make(tokens, name, rate=Rate(1, "s"))) for name in "ab")
    for now in (0.0, 1.0):
        clock.now = now
        told = [admitted(callers, caller) or callers.is_first_refusal(caller) for caller in (a, a, a, b, b)]
        assert told == [True, True, False, True, True]


def test_a_pause_gives_no_more_than_one_burst(tmp_path: Path, tokens: Tokens) -> None:
    clock = Clock()
    callers = Callers(tmp_path, clock=clock)
    caller = who(callers, make(tokens, rate=Rate(5, "s")))
    assert [admitted(callers, caller) for _ in range(6)] == [True] * 5 + [False]
    clock.now = 1e6
    assert [admitted(callers, caller) for _ in range(6)] == [True] * 5 + [False]


def test_callers_have_their_rates_apart_and_some_have_none(tmp_path: Path, tokens: Tokens) -> None:
    callers = Callers(tmp_path, clock=Clock())
    a, b, free = (
        who(callers, make(tokens, name, rate=rate))
        for name, rate in (("a", Rate(1, "s")), ("b", Rate(1, "s")), ("free", None))
    )
    assert [admitted(callers, a), admitted(callers, a), admitted(callers, b)] == [True, False, True]
    assert all(admitted(callers, free) for _ in range(100))


def test_a_change_of_other_tokens_gives_nobody_new_calls(tmp_path: Path, tokens: Tokens) -> None:
    callers = Callers(tmp_path, clock=Clock())
    header = make(tokens, "a", rate=Rate(1, "h"))
    callers.spend(who(callers, header))
    make(tokens, "b")
    assert not admitted(callers, who(callers, header))


# --- The file ----------------------------------------------------------------------------------------------------


def test_a_token_is_256_random_bits_and_only_its_digest_is_kept(tmp_path: Path, tokens: Tokens) -> None:
    headers = {make(tokens, f"t{number}") for number in range(20)}
    assert len(headers) == 20
    kept = (tmp_path / "tokens.json").read_text()
    for header in headers:
        assert re.fullmatch("Bearer aal_[A-Za-z0-9_-]{43}", header)
        assert header.removeprefix("Bearer ")[4:] not in kept
    assert not any(token.digest.hex() in repr(token) for token in tokens.all())


def test_tokens_are_read_as_they_were_written(tmp_path: Path, tokens: Tokens) -> None:
    limits: dict[str, Any] = {"overlays": ("a", "b-*"), "phases": (Phase.OPEN,), "scopes": ("replay",)}
    made, _ = tokens.create("a@b.c", **limits, rate=Rate(7, "h"), expires=NOW)
    assert Tokens(tmp_path).all() == (made,)
    assert Token.read(made.document()) == made


def test_a_name_is_given_once(callers: Callers, tokens: Tokens) -> None:
    header = make(tokens)
    with pytest.raises(OperatorError, match="already a token 'ci'"):
        make(tokens)
    assert who(callers, header).name == "ci"


def test_a_token_that_is_not_there_cannot_be_revoked(tokens: Tokens) -> None:
    with pytest.raises(OperatorError, match="there is no token 'x'"):
        tokens.revoke("x")


Kept = dict[str, Any]
DOCUMENTS: list[Callable[[Kept], Any]] = [
    lambda token: {},
    lambda token: [token],
    lambda token: {"tokens": {"ci": token}},
    lambda token: {"tokens": [token], "more": 1},
    lambda token: {"tokens": [token, token]},
    lambda token: {"tokens": [token, 1]},
    lambda token: {"tokens": [{"name": "ci"}]},
    lambda token: {"tokens": [token | {"ip": "10.0.0.1"}]},
]
MEMBERS: list[Kept] = [
    {"name": ""},
    {"name": None},
    {"sha256": "aal_secret"},
    {"sha256": 1},
    {"overlays": []},
    {"overlays": "*"},
    {"overlays": [1]},
    {"phases": ["OPENED"]},
    {"phases": [[]]},
    {"scopes": ["everything"]},
    {"rate": "0/s"},
    {"rate": 10},
    {"created": None},
    {"expires": "soon"},
    {"expires": 1},
    {"expires": "2030-01-01"},
]


def refuses_all(state: Path, document: Callable[[Kept], Any]) -> str:
    """That nobody gets in with this file, and that they are told nothing of it; gives what the operator is told."""
    callers, tokens = Callers(state), Tokens(state)
    header = make(tokens)
    assert who(callers, header).name == "ci"
    file = state / "tokens.json"
    (token,) = json.loads(file.read_text())["tokens"]
    file.write_text(json.dumps(document(token)))
    for shown in (header, None):
        with pytest.raises(SettingError) as refusal:
            who(callers, shown)
        assert refusal.value.detail == "the tokens of this bus cannot be read"
        assert "aal token list" in str(refusal.value.hint)
    with pytest.raises(SettingError, match=r"tokens\.json: found ") as told:
        tokens.all()
    return told.value.detail


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_file_that_makes_no_sense_lets_nobody_in(tmp_path: Path, document: Callable[[Kept], Any]) -> None:
    assert "allowed: " in refuses_all(tmp_path, document)


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_a_token_that_makes_no_sense_lets_nobody_in(tmp_path: Path, member: Kept) -> None:
    assert "aal_secret" not in refuses_all(tmp_path, lambda token: {"tokens": [token | member]})


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("30d", NOW + timedelta(days=30)),
        ("12h", NOW + timedelta(hours=12)),
        ("8w", NOW + timedelta(weeks=8)),
        ("2030-12-31", datetime(2030, 12, 31, tzinfo=UTC)),
        ("2030-06-01T12:00:00", datetime(2030, 6, 1, 12, tzinfo=UTC)),
        ("2030-06-01T12:00:00.7+02:00", datetime(2030, 6, 1, 10, tzinfo=UTC)),
    ],
)
def test_a_token_expires_after_a_span_or_at_a_time(text: str, moment: datetime) -> None:
    assert read_expiry(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "0d", "30", "d", "2029-12-31", "2030-01-01", "9999-12-31T23:59:59-23:00", "never", "1y", "-1d"]
)
def test_a_time_that_is_over_or_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a time to come, as 12h, 30d"):
        read_expiry(text, NOW)
