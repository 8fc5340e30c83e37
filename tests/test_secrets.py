"""Secrets: who gets which, that a change is seen, and that no value is told where it should not be."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.canonical import canonical
from bus.errors import DeniedError, OperatorError, SettingError
from bus.redaction import KEPT, LEAST, LEAST_LINE, LINES, Redactor
from bus.schemas import show
from bus.secrets import VALUE_LIMIT, Secrets, read_name, read_value
from bus.settings import DeclaredSecret
from runners.base import Outcome, ProcessTarget
from runners.output import PREVIEW_LENGTH, Log, join_log, preview
from tests.support import InProcessRunner, a_call, add_native, add_overlay, calls, running_bus, until

if TYPE_CHECKING:
    from bus.settings import Settings

VALUE = "correct-horse-battery"
PEM = "-----BEGIN KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIB\n" * 2 + "-----END KEY-----\n"


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path, env={})


def refusal_of(secrets: Secrets, overlay: str, *wanted: str) -> str:
    with pytest.raises(DeniedError) as refusal:
        secrets.for_overlay(overlay, wanted)
    assert (refusal.value.code, refusal.value.entry.http_status) == ("ERR_SECRET", 403)
    assert VALUE not in "".join(traceback.format_exception(refusal.value))
    return refusal.value.detail


# --- Who gets what -----------------------------------------------------------------------------------------------


def test_an_overlay_gets_what_it_wants_and_may_have(secrets: Secrets) -> None:
    secrets.set("A", ["psyfi"], value=VALUE)
    secrets.set("B", ["psyfi", "other"], value="b")
    assert secrets.for_overlay("psyfi", ["A"]) == {"A": VALUE}
    assert secrets.for_overlay("psyfi", ["B", "A"]) == {"A": VALUE, "B": "b"}
    assert secrets.for_overlay("psyfi", []) == {}


def test_all_that_an_overlay_cannot_have_is_named_at_once(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, env={"EMPTY": ""})
    secrets.set("A", ["other"], value=VALUE)
    secrets.set("C", ["psyfi"], env="EMPTY")
    secrets.set("D", ["psyfi"], value=VALUE)
    assert refusal_of(secrets, "psyfi", "A", "B", "C", "D") == (
        "the secret A is not allowed to psyfi; the secret B is not set; "
        "the environment variable EMPTY of the secret C is not set"
    )


def test_allowing_and_denying_count_at_once(secrets: Secrets) -> None:
    secrets.set("A", value=VALUE)
    assert "not allowed" in refusal_of(secrets, "psyfi", "A")
    secrets.allow("A", "psyfi")
    assert secrets.for_overlay("psyfi", ["A"]) == {"A": VALUE}
    secrets.deny("A", "psyfi")
    assert "not allowed" in refusal_of(secrets, "psyfi", "A")


def test_a_secret_set_anew_keeps_those_who_may_have_it(secrets: Secrets) -> None:
    secrets.set("A", ["psyfi"], value="old")
    secrets.set("A", ["other"], value="new")
    assert secrets.for_overlay("psyfi", ["A"]) == secrets.for_overlay("other", ["A"]) == {"A": "new"}


def test_a_secret_that_is_removed_is_gone(tmp_path: Path, secrets: Secrets) -> None:
    secrets.set("A", ["psyfi"], value=VALUE)
    secrets.remove("A")
    assert refusal_of(secrets, "psyfi", "A") == "the secret A is not set"
    assert VALUE not in (tmp_path / "secrets.json").read_text()


def test_of_a_variable_only_its_name_is_kept(tmp_path: Path) -> None:
    env = {"THE_KEY": VALUE}
    secrets = Secrets(tmp_path, env=env)
    secrets.set("A", ["psyfi"], env="THE_KEY")
    assert secrets.for_overlay("psyfi", ["A"]) == {"A": VALUE}
    assert VALUE not in (tmp_path / "secrets.json").read_text()
    assert secrets.withheld() == {"THE_KEY"}
    env["THE_KEY"] = "another"
    assert secrets.for_overlay("psyfi", ["A"]) == {"A": "another"}


def test_what_the_settings_declare_goes_before_what_is_kept_and_is_changed_there(tmp_path: Path) -> None:
    Secrets(tmp_path).set("A", ["other"], value="kept")
    declared = [DeclaredSecret("A", "THE_KEY", ("psyfi",))]
    secrets = Secrets(tmp_path, declared, env={"THE_KEY": VALUE})
    assert secrets.for_overlay("psyfi", ["A"]) == {"A": VALUE}
    assert "not allowed" in refusal_of(secrets, "other", "A")
    changes: list[Any] = [
        lambda: secrets.set("A", value="x"),
        lambda: secrets.allow("A", "other"),
        lambda: secrets.deny("A", "psyfi"),
        lambda: secrets.remove("A"),
    ]
    for change in changes:
        with pytest.raises(OperatorError, match=r"the secret A stands in aal\.toml"):
            change()


@pytest.mark.parametrize(
    ("name", "env", "overlay"), [("PATH", "X", "a"), ("A", "not a name", "a"), ("A", "X", "Not-One"), ("a-b", "X", "a")]
)
def test_a_declaration_that_cannot_be_stops_the_start(tmp_path: Path, name: str, env: str, overlay: str) -> None:
    with pytest.raises(SettingError, match=rf"aal\.toml: secrets\.{name}: found "):
        Secrets(tmp_path, [DeclaredSecret(name, env, (overlay,))])


@pytest.mark.parametrize("change", ["allow", "deny", "remove"])
def test_a_secret_that_is_not_there_cannot_be_changed(secrets: Secrets, change: str) -> None:
    with pytest.raises(OperatorError, match="there is no secret A"):
        getattr(secrets, change)("A", *(["psyfi"] if change != "remove" else []))


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "PATH", "LD_PRELOAD", "AAL_X", "OVERLAY_STATE", "A" * 129])
def test_a_name_that_no_variable_should_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not match|another meaning"):
        read_name(name)


@pytest.mark.parametrize("value", ["", "a\0b", "\udcff", "x" * (VALUE_LIMIT + 1), None])
def test_a_value_that_no_variable_can_hold_is_refused_and_not_repeated(value: Any) -> None:
    with pytest.raises(ValueError, match="a value") as refusal:
        read_value(value)
    assert "xxx" not in str(refusal.value)


# --- Looks -------------------------------------------------------------------------------------------------------


def test_the_stamp_grows_with_each_change_and_only_then(tmp_path: Path) -> None:
    env = {"THE_KEY": "one"}
    secrets, other = Secrets(tmp_path, env=env), Secrets(tmp_path)
    stamps = [secrets.stamp(), secrets.stamp()]
    assert stamps[0] == stamps[1]
    for change in (
        lambda: other.set("A", value="v"),
        lambda: other.allow("A", "psyfi"),
        lambda: other.set("A", value="w"),
        lambda: other.set("B", env="THE_KEY"),
        lambda: env.update(THE_KEY="two"),
        lambda: env.pop("THE_KEY"),
        lambda: other.remove("A"),
    ):
        change()
        stamps.append(secrets.stamp())
        assert secrets.stamp() == stamps[-1] > stamps[-2]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"secrets": []}',
        '{"secrets": {"A": "VALUE"}}',
        '{"secrets": {"A": {"value": "VALUE"}}}',
        '{"secrets": {"A": {"value": "VALUE", "overlays": "psyfi"}}}',
        '{"secrets": {"A": {"value": "VALUE", "env": "VALUE", "overlays": []}}}',
        '{"secrets": {"A": {"env": "VALUE", "overlays": []}}}',
        '{"secrets": {"A": {"value": "VALUE\\u0000", "overlays": []}}}',
        '{"secrets": {"A": {"value": "VALUE", "overlays": ["*"]}}}',
    ],
)
def test_a_file_that_makes_no_sense_gives_no_secret_and_no_value(tmp_path: Path, secrets: Secrets, damage: str) -> None:
    secrets.set("A", ["psyfi"], value=VALUE)
    assert secrets.for_overlay("psyfi", ["A"])
    (tmp_path / "secrets.json").write_text(damage.replace("VALUE", VALUE))
    for look in (lambda: secrets.for_overlay("psyfi", ["A"]), secrets.stamp, secrets.withheld, secrets.all):
        with pytest.raises(SettingError, match=r"secrets\.json: found ") as refusal:
            look()
        assert VALUE not in "".join(traceback.format_exception(refusal.value))
    assert secrets.for_overlay("psyfi", []) == {}
    assert secrets.redact(VALUE) == "[secret A]"


def test_no_value_is_in_what_is_shown_of_a_secret(secrets: Secrets) -> None:
    secrets.set("A", ["psyfi"], value=VALUE)
    (secret,) = secrets.all()
    assert VALUE not in f"{secret!r}{secret}{secret.shown()}"
    assert secret.shown() == {"name": "A", "source": "secrets.json", "env": None, "overlays": ["psyfi"]}


# --- Redaction ---------------------------------------------------------------------------------------------------


def learnt(*values: str) -> Redactor:
    redactor = Redactor()
    redactor.learn((f"S{number}", value) for number, value in enumerate(values))
    return redactor


def test_without_secrets_a_text_stays_the_same_object() -> None:
    text, raw = "any text at all", b"any bytes at all"
    assert Redactor().text(text) is text
    assert Redactor().raw(raw) is raw
    assert learnt("something").text(text) is text


def test_each_value_becomes_its_name() -> None:
    redactor = learnt("first-value", "second-value")
    assert redactor.text("a second-value, first-valuefirst-value") == "a [secret S1], [secret S0][secret S0]"
    assert redactor.raw(b"\xff second-value") == b"\xff [secret S1]"


def test_the_longer_of_two_values_that_begin_alike_is_taken_whole() -> None:
    assert learnt("abcdef", "abcdefghij").text("abcdefghij abcdef") == "[secret S1] [secret S0]"


def test_a_value_too_short_to_be_told_from_other_text_is_left() -> None:
    assert learnt("x" * (LEAST - 1)).text("x" * LEAST) == "x" * LEAST
    assert learnt("x" * LEAST).text("x" * LEAST) == "[secret S0]"


@pytest.mark.parametrize("value", ['quo"te\\back', "tab\tand\nline", "größe-überall", "a b&c=d/e?f", "it's 'quoted'"])
def test_a_value_is_found_as_json_python_and_addresses_spell_it(value: str) -> None:
    redactor = learnt(value)
    texts = [
        json.dumps({"v": value}),
        json.dumps({"v": value}, ensure_ascii=False),
        orjson.dumps({"v": value}).decode(),
        repr(["x", value]),
    ]
    for text in texts:
        assert "[secret S0]" in redactor.text(text)
        assert b"[secret S0]" in redactor.raw(text.encode())


def test_the_lines_of_a_long_value_are_found_alone() -> None:
    redactor = learnt(PEM)
    assert redactor.text(f"12:00 {PEM.splitlines()[1]}") == "12:00 [secret S0]"
    assert redactor.text("a -----BEGIN KEY----- here") == "a -----BEGIN KEY----- here"


def test_a_value_that_is_changed_or_removed_is_still_found(secrets: Secrets) -> None:
    secrets.set("A", value="the old value")
    secrets.stamp()
    secrets.set("A", value="the new value")
    secrets.stamp()
    secrets.remove("A")
    secrets.stamp()
    assert secrets.redact("the old value, the new value") == "[secret A], [secret A]"


def test_of_very_many_values_the_oldest_are_given_up() -> None:
    redactor = Redactor()
    redactor.learn(("OLD", f"value-{number:06}") for number in range(KEPT + 1))
    assert redactor.text("value-000000") == "[secret OLD]"
    redactor.learn([("CURRENT", "always-there")])
    assert redactor.text("value-000000") == "value-000000"
    assert redactor.text("value-000001 always-there") == "[secret OLD] [secret CURRENT]"


def test_no_value_is_given_up_for_a_long_one() -> None:
    lines = [f"{number:06} {'x' * LEAST_LINE}" for number in range(VALUE_LIMIT // (LEAST_LINE + 8))]
    redactor = learnt(VALUE, "\n".join(lines))
    assert redactor.text(f"{VALUE} and {lines[LINES - 1]}!") == "[secret S0] and [secret S1]!"
    assert redactor.text(f"only {lines[LINES]}!") == f"only {lines[LINES]}!"
    redactor.learn([("S2", "\n".join(lines[::-1]))])
    assert redactor.text(VALUE) == "[secret S0]"


LONG = "".join(f"{number:x}zé'" for number in range(100, 140))
"""No six characters of it stand there twice."""


def says_more_than_a_scrap(text: str) -> bool:
    return any(LONG[at : at + LEAST] in text for at in range(len(LONG) - LEAST + 1))


def test_a_value_that_a_quotation_cuts_is_not_half_told() -> None:
    redactor = learnt(LONG)
    for before in range(PREVIEW_LENGTH + 1):
        said = "-" * before + LONG + "after it" * PREVIEW_LENGTH
        for quoted in (preview(said.encode()), f"found {show(said)}; allowed: none"):
            assert not says_more_than_a_scrap(redactor.text(f"it wrote {quoted}")), quoted


@pytest.mark.parametrize("noise", [b"", b"x" * 20, b"x" * 300])
def test_a_value_that_a_log_cuts_is_not_half_told(noise: bytes) -> None:
    redactor, value = learnt(LONG), LONG.encode()
    limit = len(value) - 1
    for before in range(2 * len(value)):
        log = Log(limit)
        log.add(b"-" * before + value)
        kept = join_log(noise, log)
        dropped = len(noise + b"\n" if noise else b"") + before + len(value) - limit
        assert f"\n[... {dropped} bytes left out ...]\n" in kept
        assert not says_more_than_a_scrap(redactor.text(kept)), kept


def test_a_value_that_a_chunk_ends_is_not_half_told() -> None:
    redactor, value = learnt(LONG), LONG.encode()
    for at in range(len(value) + 1):
        told = [redactor.raw(b"before " + value[:at]), redactor.raw(value[at:] + b" after")]
        assert not any(says_more_than_a_scrap(text.decode("utf-8", "replace")) for text in told), told


def test_what_a_cut_leaves_of_a_value_hides_no_other_value() -> None:
    redactor = learnt("ababab-xxxx-ababab", "ababab")
    assert redactor.text("<ababab-xxxx-ababab-xxx") == "<[secret S0]"
    assert redactor.text("<ababab-xxxx") == "<[secret S0]"
    assert redactor.text("<ababab") == "<[secret S1]"


def test_a_beginning_where_nothing_was_cut_stays() -> None:
    redactor = learnt("postgres://user:password@host")
    assert redactor.text("a postgres database") == "a postgres database"
    assert redactor.json({"kind": "postgres"}) == {"kind": "postgres"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=LEAST))
def test_json_keeps_its_form_and_loses_every_value(document: Any, value: str) -> None:
    redactor = learnt(value)
    cleaned = redactor.json({"first": value, "more": [f"<{value}>", document], value: 1})
    assert value not in {*cleaned, cleaned["first"], *cleaned["more"][:1]}
    assert not any(value in text for text in texts_of(cleaned))
    if not redactor.occurs_in(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")):
        assert redactor.json(document) == document


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if "[secret " not in value else []
    if isinstance(value, dict):
        return [text for member in (*value, *value.values()) for text in texts_of(member)]
    return [text for member in value for text in texts_of(member)] if isinstance(value, list) else []


def test_numbers_stay_so_that_json_stays_json() -> None:
    assert learnt("123456").json({"n": 123456, "t": "123456"}) == {"n": 123456, "t": "[secret S0]"}


# --- A whole call ------------------------------------------------------------------------------------------------

LEAKY = """
import json, os, pathlib, sys, time
state = pathlib.Path(os.environ["OVERLAY_STATE"])
payload = json.load(sys.stdin)["payload"]
(state / "running").touch()
while not (state / "go").exists():
    time.sleep(0.01)
key = os.environ["KEY"]
print("a note with", key, file=sys.stderr)
if payload["how"] == "crash":
    raise RuntimeError(key)
result = {key: [key], "whole": 1.0, "\\U0001f600": 0, "\\ufb33": 1}
print(json.dumps({"ok": payload["how"] == "well", "result": result, "error": "no " + key}))
"""


def add_leaky(settings: Settings) -> None:
    command = {"proc": {"command": ["python3", "run.py"], "mode": "spawn"}}  # whose arguments others see
    folder = add_native(
        settings.overlays, "leaky", {"run": {"runner": "proc", "path": "run"}}, entrypoints=command, secrets=["KEY"]
    )
    (folder / "run.py").write_text(LEAKY)


def every_file(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def every_command_line() -> bytes:
    """The arguments of all processes, as `ps` would show them."""
    found = b""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found += (process / "cmdline").read_bytes()
    return found


@pytest.mark.parametrize("how", ["well", "badly", "crash"])
async def test_a_value_that_an_overlay_says_is_in_no_record_no_error_no_argument_and_no_log_of_the_bus(
    settings: Settings, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    add_leaky(settings)
    Secrets(settings.state).set("KEY", ["leaky"], value=VALUE)
    state = settings.state / "state" / "leaky"
    async with running_bus(settings) as bus:
        call = asyncio.create_task(bus.invoke(a_call("leaky", data={"how": how, "said": f"<{VALUE}>"})))
        await until(lambda: call.done() or (state / "running").exists())
        assert not call.done(), call.result().body
        arguments = every_command_line()
        (state / "go").touch()
        answer = await call
    assert answer.ok == (how == "well")
    assert b"run.py" in arguments
    assert VALUE.encode() not in arguments
    assert VALUE not in f"{answer.body['error']}{answer.body['detail']}{answer.body['hint']}{caplog.text}"
    recorded = settings.ledger.read_bytes()
    assert b"[secret KEY]" in recorded
    assert [line + b"\n" for line in recorded.splitlines()] == [
        canonical(json.loads(line)) + b"\n" for line in recorded.splitlines()
    ]
    assert VALUE.encode() not in recorded
    assert VALUE.encode() not in every_file(settings.logs)


async def test_the_last_words_of_a_helper_are_told_without_the_secret_that_they_say(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    program = {"entrypoints": {"proc": {"command": ["python3", "run.py"]}}, "secrets": ["KEY"]}
    folder = add_native(settings.overlays, "lost", {"run": {"runner": "proc"}}, **program)
    (folder / "run.py").touch()
    interpreter = folder / ".venv/bin/python3"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text('#!/bin/sh\necho "no use for $KEY" >&2\nexit 1\n')
    interpreter.chmod(0o755)
    Secrets(settings.state).set("KEY", ["lost"], value=VALUE)
    async with running_bus(settings) as bus:
        assert not (await bus.invoke(a_call("lost"))).ok
    assert "lost cannot be forked for calls" in caplog.text
    assert "no use for [secret KEY]" in caplog.text
    assert VALUE not in caplog.text


async def test_a_code_of_an_overlays_own_that_is_a_secret_is_not_written(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    Secrets(settings.state).set("KEY", ["echo"], value="AKIAIOSFODNN7EXAMPLE")
    runner = InProcessRunner(lambda _: Outcome(result={"ok": False, "code": "AKIAIOSFODNN7EXAMPLE"}))
    async with running_bus(settings, runner) as bus:
        answer = await bus.invoke(a_call("echo"))
    assert answer.body["code"] == "ERR_OVERLAY_FAILED"
    assert b"AKIAIOSFODNN7EXAMPLE" not in settings.ledger.read_bytes() + answer.json


async def test_an_overlay_without_the_right_to_a_secret_does_not_start(settings: Settings) -> None:
    add_leaky(settings)
    Secrets(settings.state).set("KEY", ["other"], value=VALUE)
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("leaky"))
    assert (answer.http_status, answer.body["code"]) == (403, "ERR_SECRET")
    assert answer.body["error"] == "the secret KEY is not allowed to leaky"
    assert [line["code"] for line in calls(settings)] == ["ERR_SECRET"]
    assert not (settings.state / "state" / "leaky" / "running").exists()


async def test_a_variable_that_holds_a_secret_is_not_passed_under_its_own_name(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", VALUE)
    monkeypatch.setenv("ANOTHER", "plain")
    Secrets(settings.state).set("KEY", [], env="THE_KEY")
    runner = InProcessRunner()
    add_native(settings.overlays, "curious", {"run": {"runner": "proc", "path": "run"}}, env=["THE_KEY", "ANOTHER"])
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("curious"))
    (job,) = runner.jobs
    assert isinstance(job.target, ProcessTarget)
    assert job.target.env["ANOTHER"] == "plain"
    assert VALUE not in job.target.env.values()


async def test_a_variable_of_a_secrets_name_is_not_passed_to_those_who_may_not_have_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", VALUE)
    Secrets(settings.state).set("KEY", ["other"], value=VALUE)
    runner = InProcessRunner()
    add_native(settings.overlays, "curious", {"run": {"runner": "proc", "path": "run"}}, env=["KEY"])
    add_native(settings.overlays, "other", {"run": {"runner": "proc", "path": "run"}}, secrets=["KEY"])
    async with running_bus(settings, runner) as bus:
        assert (await bus.invoke(a_call("curious"))).ok
        assert (await bus.invoke(a_call("other"))).ok
    curious, other = (job.target for job in runner.jobs)
    assert isinstance(curious, ProcessTarget)
    assert isinstance(other, ProcessTarget)
    assert "KEY" not in curious.env
    assert other.env["KEY"] == VALUE


@pytest.mark.parametrize("asked_by", ["manifest", "setting"])
async def test_a_variable_that_becomes_a_secret_is_taken_from_those_who_have_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, asked_by: str
) -> None:
    monkeypatch.setenv("THE_KEY", VALUE)
    if asked_by == "setting":
        settings = dataclasses.replace(settings, pass_env="THE_KEY")
    runner = InProcessRunner()
    asked = {"env": ["THE_KEY"]} if asked_by == "manifest" else {}
    add_native(settings.overlays, "early", {"run": {"runner": "proc", "path": "run"}}, **asked)
    async with running_bus(settings, runner) as bus:
        assert (await bus.invoke(a_call("early"))).ok
        Secrets(settings.state).set("KEY", [], env="THE_KEY")
        assert (await bus.invoke(a_call("early"))).ok
    before, after = runner.jobs
    assert isinstance(before.target, ProcessTarget)
    assert isinstance(after.target, ProcessTarget)
    assert before.target.env["THE_KEY"] == VALUE
    assert "THE_KEY" not in after.target.env
    assert before.edition < after.edition


async def test_a_changed_secret_begins_a_new_edition(settings: Settings) -> None:
    runner = InProcessRunner()
    add_native(settings.overlays, "user", {"run": {"runner": "proc", "path": "run"}}, secrets=["KEY"])
    secrets = Secrets(settings.state)
    async with running_bus(settings, runner) as bus:
        for value in ("first value", "first value", "second value"):
            secrets.set("KEY", ["user"], value=value)
            assert (await bus.invoke(a_call("user"))).ok
    one, same, other = runner.jobs
    assert one.edition == same.edition < other.edition
    assert isinstance(other.target, ProcessTarget)
    assert other.target.env["KEY"] == "second value"
