"""The readers of text: each gives a value or one kind of error, whatever it is given, and both can be told as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from hypothesis import strategies as st

from bus import envelopes, manifests, provenance, runes, settings, verification
from bus.canonical import canonical
from bus.dispatch import Bus
from bus.errors import CATALOGUE, RequestError, SettingError
from bus.manifests import ManifestError
from bus.model import Invocation
from bus.overlay_entry import Entry
from bus.runes import RuneError
from runners.base import Code, Outcome, parse_json
from runners.output import judge, read_reply
from tests.fuzz import documents
from tests.fuzz.campaign import Probe, Target
from tests.fuzz.samples import damaged_bytes, scalars, texts_of, to_bytes, values
from tests.support import InProcessRunner, a_call, add_native, misfits, settings_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis.strategies import DrawFn, SearchStrategy

    from bus.errors import BusError
    from runners.base import Job

NAME = "echo"
LINES = 100
"""Of the ledger, that are held against the schema of records at the end."""


@contextlib.contextmanager
def manifest_files() -> Iterator[Probe]:
    """Any bytes as `manifest.json`: a `Manifest` or a `ManifestError`, and either way a row of `GET /overlays`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / NAME
        folder.mkdir()
        yield Probe(texts_of(documents.MANIFESTS), lambda text: _read_manifest(folder, text))


def _read_manifest(folder: Path, text: bytes) -> str:
    (folder / manifests.FILE).write_bytes(text)
    try:
        entry = Entry(NAME, folder, manifest=manifests.read(folder))
    except ManifestError as error:
        entry = Entry(NAME, folder, error=error)
        can_be_told(error)
    orjson.dumps(entry.detail())
    return entry.status if entry.manifest is None else "sound"


@st.composite
def _rune_texts(draw: DrawFn) -> str:
    """Pieces of the language in an order that is often right, with others between them now and then."""
    clauses = draw(st.lists(st.sampled_from(documents.RUNE_CLAUSES) | _rune_pieces, min_size=1, max_size=6))
    return draw(st.sampled_from((";", "; ", "\n;", "", ";;"))).join(clauses)


_rune_pieces = st.lists(st.sampled_from(documents.RUNE_TOKENS) | st.text(max_size=5), max_size=12).map("".join)


@contextlib.contextmanager
def rune_texts() -> Iterator[Probe]:
    """Any text as a rune: a `MemoryProfile` that its own text gives again, or a `RuneError`."""
    damaged = damaged_bytes(st.sampled_from(documents.RUNES).map(str.encode)).map(lambda b: b.decode("latin-1"))
    yield Probe(st.one_of(_rune_texts(), damaged, st.text(st.characters(), max_size=200)), _read_rune)


def _read_rune(text: str) -> str:
    try:
        profile = runes.resolve(text)
    except RuneError as error:
        can_be_told(error)
        return "refused"
    if profile.name is None:
        assert runes.parse(runes.format(profile)) == profile
    return "sound"


@contextlib.contextmanager
def request_bodies() -> Iterator[Probe]:
    """Any bytes as the body of a call: an `Invocation` with the same payload, or a `RequestError`."""
    targets = st.sampled_from((NAME, "echo.run", "echo.", ".run", "a.b.c", "\ud800", "")) | st.text(max_size=8)
    cases = st.tuples(texts_of(documents.REQUESTS), targets, st.none() | st.sampled_from(("run", "", "echo.run")))
    yield Probe(cases, _read_request)


def _read_request(case: tuple[bytes, str, str | None]) -> str:
    body, target, capability = case
    try:
        call = envelopes.read_invocation(body, target, capability)
    except RequestError as error:
        can_be_told(error)
        return "refused"
    assert isinstance(call, Invocation)
    assert canonical(parse_json(call.payload_json)) == call.payload_json  # so a line can be replayed
    return "sound"


@contextlib.contextmanager
def settings_sources() -> Iterator[Probe]:
    """Any bytes as `aal.toml` and any environment: `Settings` or a `SettingError` that says all that is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield Probe(st.tuples(_settings_files(), _environments()), lambda case: _read_settings(folder, *case))


@st.composite
def _settings_files(draw: DrawFn) -> bytes:
    """Lines of `name = value` and then a sound table, with damage between them."""
    names = st.sampled_from([row.name for row in settings.table()]) | st.sampled_from(("", "secrets", "[x]", "ports"))
    figures = st.sampled_from(documents.TOML_VALUES) | scalars.map(lambda value: to_bytes(value).decode())
    lines = draw(st.lists(st.tuples(names, figures).map(" = ".join) | st.text(max_size=12), max_size=4))
    table = draw(st.sampled_from(("", documents.TOML_SECRETS)))
    text = "\n".join([*lines, table]).encode("utf-8", "surrogatepass")
    return draw(st.just(text) | damaged_bytes(st.just(text)) | st.binary(max_size=40))


def _environments() -> SearchStrategy[dict[str, str]]:
    variables = [row.env for row in settings.table()]
    names = st.sampled_from(variables) | st.sampled_from(("AAL_", "AAL_PROT", "AAL_port", "HOME", "aal_port"))
    figures = st.sampled_from(documents.ENVIRONMENT_VALUES) | st.text(max_size=12)
    return st.dictionaries(names, figures, max_size=3)


def _read_settings(folder: Path, file: bytes, environment: dict[str, str]) -> str:
    (folder / settings.FILE).write_bytes(file)
    try:
        found, rows = settings.explain(folder, environment)
    except SettingError as error:
        can_be_told(error)
        return "refused"
    assert {row.name for row in rows} == {row.name for row in settings.table()}
    assert found.overlays.is_absolute()
    return "sound"


@contextlib.contextmanager
def replies() -> Iterator[Probe]:
    """Any bytes that a program writes, with any exit status: an answer and a line in their forms, and never a crash.

    They go through a whole bus, which judges them as it would those of a process.
    """
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as loop:
        given: list[tuple[bytes, int]] = []
        changed = settings_in(Path(name), fsync="never", dev_log_payload=False)
        add_native(changed.overlays, NAME, documents.REPLYING)
        bus = Bus(changed, plugins=[InProcessRunner(lambda job: _outcome(job, *given[-1]))])
        loop.run(bus.start(watch=False))
        try:
            cases = st.tuples(_stdout(), st.sampled_from((0, 0, 0, 1, -9)), st.sampled_from([*documents.REPLYING]))
            yield Probe(cases, lambda case: loop.run(_reply(bus, given, *case)))
        finally:
            loop.run(bus.close())
        assert verification.verify(changed.ledger).ok
        assert [misfits("record", line) for line in provenance.tail(changed.ledger, LINES)] == [[]] * LINES


def _stdout() -> SearchStrategy[bytes]:
    alone = texts_of(documents.REPLIES)
    noisy = st.tuples(st.binary(max_size=20), alone).map(b"\n".join)
    usual = values.map(lambda value: to_bytes({"ok": True, "result": value}))
    return st.one_of(alone, usual, noisy)


def _outcome(job: Job, stdout: bytes, exit_code: int) -> Outcome:
    """As `runners.process` makes it of a program that has ended."""
    reply = read_reply(stdout)
    code, error = judge(reply, exit_code)
    result = reply.value if code == Code.OK else None
    log = reply.noise.decode("utf-8", "replace")
    return Outcome(code, result, error, exit_code=exit_code, log=log, output_bytes=len(stdout))


async def _reply(bus: Bus, given: list[tuple[bytes, int]], stdout: bytes, exit_code: int, capability: str) -> str:
    given[:] = [(stdout, exit_code)]
    answer = await bus.invoke(a_call(NAME, capability))
    body = orjson.loads(answer.json)
    assert misfits("outcome", body) == []
    assert body["code"] != "ERR_INTERNAL"
    if body["ok"]:
        return "ok"
    return "own code" if body["code"] not in CATALOGUE else str(body["code"])


def can_be_told(error: BusError) -> None:
    """An answer to a caller can be made of it, with a code that the catalogue has."""
    body: dict[str, Any] = orjson.loads(orjson.dumps(error.body()))
    assert body["code"] in CATALOGUE
    assert body["detail"]


_BOTH = frozenset({"sound", "refused"})

TARGETS = (
    Target("manifests", "manifest.json", 10, manifest_files, frozenset({"sound", "broken"})),
    Target("runes", "memory declarations", 8, rune_texts, _BOTH),
    Target("requests", "bodies of calls", 10, request_bodies, _BOTH),
    Target("settings", "aal.toml and AAL_*", 6, settings_sources, _BOTH),
    Target("replies", "what programs write", 10, replies, frozenset({"ok", Code.FAILED, Code.PROTOCOL, Code.CRASH})),
)
