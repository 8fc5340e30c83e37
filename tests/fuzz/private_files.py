"""The files of tokens and of secrets, with anything in them: one that makes no sense lets nobody in, shows nothing."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from bus import secrets, tokens
from bus.callers import Callers
from bus.errors import CallerError, DeniedError, SettingError
from bus.secrets import Secrets
from runners.base import parse_json
from tests.fuzz import documents
from tests.fuzz.campaign import Probe, Target
from tests.fuzz.readers import can_be_told
from tests.fuzz.samples import texts_of, to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypothesis.strategies import SearchStrategy

    from bus.errors import BusError


@contextlib.contextmanager
def token_files() -> Iterator[Probe]:
    """Any bytes as `tokens.json` and as the header: a `Caller`, 401, or a `SettingError`; no token but a sound one."""
    headers = st.sampled_from((None, *documents.AUTHORIZATIONS)) | st.binary(max_size=60)
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        yield Probe(st.tuples(_often_sound(documents.TOKENS), headers), lambda case: _identify(state, *case))


def _identify(state: Path, text: bytes, header: bytes | None) -> str:
    _write(state / tokens.FILE, text)
    try:
        caller = Callers(state).identify(header)
    except (CallerError, SettingError) as error:
        can_be_told(error)
        return "refused" if isinstance(error, CallerError) else "closed"
    if caller.name is None:
        assert parse_json(text) == {"tokens": []}
        return "local"
    assert header is not None
    assert header.endswith(documents.TOKEN.encode())
    return "known"


@contextlib.contextmanager
def secret_files() -> Iterator[Probe]:
    """Any bytes as `secrets.json`: the values, ERR_SECRET, or a `SettingError` without a value in its words."""
    wanted = st.lists(st.sampled_from(("API_KEY", "B", "NO")), max_size=3)
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        cases = st.tuples(_often_sound(documents.SECRETS), st.sampled_from(("echo", "psyfi")), wanted)
        yield Probe(cases, lambda case: _secrets_of(state, *case))


def _secrets_of(state: Path, text: bytes, overlay: str, wanted: list[str]) -> str:
    _write(state / secrets.FILE, text)
    try:
        found = Secrets(state, env={"VAR": documents.SECRET_VALUE}).for_overlay(overlay, wanted)
    except (DeniedError, SettingError) as error:
        can_be_told(error)
        _keeps_quiet(error)
        return "refused" if isinstance(error, DeniedError) else "closed"
    assert found.keys() == set(wanted)
    return "given" if found else "nothing asked"


def _keeps_quiet(error: BusError) -> None:
    assert documents.SECRET_VALUE not in str(error.body())


def _often_sound(known: Sequence[Any]) -> SearchStrategy[bytes]:
    """One wrong member refuses the whole file. Blanks tell sound ones apart: no case comes a second time."""
    sound = st.builds(
        lambda document, blanks: to_bytes(document) + b" " * blanks, st.sampled_from(known), st.integers(0, 99)
    )
    return st.booleans().flatmap(lambda usable: sound if usable else texts_of(known))


def _write(file: Path, text: bytes) -> None:
    """Only its owner may read such a file, or it is refused for that."""
    file.touch(mode=0o600)
    file.write_bytes(text)


TARGETS = (
    Target(
        "tokens", "tokens.json and Authorization", 6, token_files, frozenset({"local", "known", "refused", "closed"})
    ),
    Target("secrets", "secrets.json", 5, secret_files, frozenset({"given", "refused", "closed"})),
)
