"""`aal token` and `aal secret`, in process; and a value that is set is in no argument of a process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus.callers import Callers
from bus.console import Exit
from bus.secrets import Secrets
from tests.cli_fixtures import aal, plain_environment
from tests.support import PATIENCE_S, REPO

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli_fixtures import Ran

VALUE = "correct-horse-battery"
DECLARED = '[secrets]\nTHEIRS = {env = "THE_KEY", overlays = ["psyfi"]}\n'


# --- aal token ---------------------------------------------------------------------------------------------------


def test_a_new_token_is_all_of_stdout_and_lets_its_holder_in(aal: Callable[..., Ran], tmp_path: Path) -> None:
    ran = aal("token", "create", "--name", "ci")
    assert ran.code == Exit.OK
    assert re.fullmatch(r"aal_[A-Za-z0-9_-]{43}\n", ran.out)
    assert "shown this once" in ran.err
    assert "first one" in ran.err
    assert Callers(tmp_path / ".aal").identify(f"Bearer {ran.out.strip()}".encode()).name == "ci"
    assert "first one" not in aal("token", "create", "--name", "second").err


def test_a_token_with_limits_is_shown_with_them_but_for_itself(aal: Callable[..., Ran]) -> None:
    options = "--overlays psyfi,fin-* --phases clear,OPEN --scopes replay,invoke --rate 10/s --expires 2100-01-01"
    made = aal("token", "create", "--name", "ci", *options.split(), "--json").json
    token = made.pop("token")
    (listed,) = aal("token", "list", "--json").json["tokens"]
    assert listed == made
    assert listed | {"created": ""} == {
        "name": "ci",
        "overlays": ["psyfi", "fin-*"],
        "phases": ["OPEN", "CLEAR"],
        "scopes": ["invoke", "replay"],
        "rate": "10/s",
        "created": "",
        "expires": "2100-01-01T00:00:00Z",
    }
    shown = aal("token", "list").out
    assert "psyfi, fin-*" in shown
    assert token not in shown


def test_a_token_may_invoke_but_not_ascend_unless_it_is_said(aal: Callable[..., Ran]) -> None:
    made = aal("token", "create", "--name", "ci", "--json").json
    assert (made["overlays"], made["scopes"]) == (["*"], ["invoke"])
    assert made["phases"] == ["OPEN", "ALIGN", "CLEAR", "SEAL"]
    assert (made["rate"], made["expires"]) == (None, None)


def test_a_revoked_token_is_gone_and_the_last_one_opens_the_bus(aal: Callable[..., Ran], tmp_path: Path) -> None:
    headers = [f"Bearer {aal('token', 'create', '--name', name).out.strip()}".encode() for name in ("a", "b")]
    callers = Callers(tmp_path / ".aal")
    assert [callers.identify(header).name for header in headers] == ["a", "b"]
    ran = aal("token", "revoke", "a")
    assert (ran.code, ran.out, ran.err) == (Exit.OK, "revoked a\n", "")
    assert callers.identify(headers[1]).name == "b"
    assert aal("token", "revoke", "b", "--json").json == {"name": "b", "left": 0}
    assert callers.identify(None).name is None
    assert "no tokens" in aal("token", "list").out


def test_the_last_revocation_says_that_the_bus_is_open(aal: Callable[..., Ran]) -> None:
    aal("token", "create", "--name", "a")
    assert "the last one" in aal("token", "revoke", "a").err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--name a b", "unexpected"),
        ("--name /etc", "a name that matches"),
        ("--name a --overlays Psyfi", "pattern of overlays' names"),
        ("--name a --overlays a,,b", "pattern of overlays' names"),
        ("--name a --phases OPEN,SHUT", "'SHUT' is not one of OPEN, ALIGN"),
        ("--name a --scopes root", "'root' is not one of invoke, read-ledger, replay, admin"),
        ("--name a --rate fast", "a rate as 10/s"),
        ("--name a --rate 0/s", "a rate as 10/s"),
        ("--name a --expires 2020-01-01", "is over"),
        ("--name a --expires tomorrow", "a time to come"),
        ("", "--name"),
    ],
)
def test_a_token_that_cannot_be_is_wrong_usage_and_makes_nothing(
    aal: Callable[..., Ran], tmp_path: Path, arguments: str, why: str
) -> None:
    ran = aal("token", "create", *arguments.split())
    assert (ran.code, ran.out, why in ran.err) == (Exit.USAGE, "", True)
    assert not (tmp_path / ".aal" / "tokens.json").exists()


def test_a_name_that_is_taken_or_not_there_is_a_failure(aal: Callable[..., Ran]) -> None:
    aal("token", "create", "--name", "a")
    ran = aal("token", "create", "--name", "a")
    assert (ran.code, "ERR_EXISTS" in ran.err, ran.out) == (Exit.FAILED, True, "")
    ran = aal("token", "revoke", "b", "--json")
    assert (ran.code, json.loads(ran.err)["code"]) == (Exit.FAILED, "ERR_NOT_FOUND")


def test_a_damaged_file_of_tokens_is_told_with_what_mends_it(aal: Callable[..., Ran], tmp_path: Path) -> None:
    aal("token", "create", "--name", "a")
    (tmp_path / ".aal" / "tokens.json").write_text("{")
    for arguments in (["list"], ["create", "--name", "b"], ["revoke", "a"]):
        ran = aal("token", *arguments)
        assert (ran.code, "tokens.json: found " in ran.err, "hint: " in ran.err) == (Exit.USAGE, True, True)


def test_an_expired_token_is_marked(aal: Callable[..., Ran], tmp_path: Path) -> None:
    aal("token", "create", "--name", "a", "--expires", "30d")
    file = tmp_path / ".aal" / "tokens.json"
    file.write_text(re.sub('"expires": ".{20}"', '"expires": "2020-01-01T00:00:00Z"', file.read_text()))
    assert "2020-01-01T00:00:00Z (over)" in aal("token", "list").out


# --- aal secret --------------------------------------------------------------------------------------------------


def test_a_secret_is_set_from_stdin_and_nothing_shows_its_value(aal: Callable[..., Ran], tmp_path: Path) -> None:
    ran = aal("secret", "set", "KEY", "--overlay", "psyfi", "--overlay", "other", stdin=f"{VALUE}\n".encode())
    assert (ran.code, ran.out) == (Exit.OK, "KEY: other, psyfi may have it\n")
    assert Secrets(tmp_path / ".aal").for_overlay("psyfi", ["KEY"]) == {"KEY": VALUE}
    told = [ran, aal("secret", "list"), aal("secret", "list", "--json"), aal("secret", "allow", "KEY", "third")]
    told += [aal("secret", "deny", "KEY", "third", "--json"), aal("config"), aal("config", "--json")]
    assert not any(VALUE in one.out + one.err for one in told)
    assert aal("secret", "remove", "KEY", "--json").json == {"name": "KEY", "removed": True}
    assert "no secrets" in aal("secret", "list").out


@pytest.mark.parametrize(
    ("given", "kept"), [(b"a b ", "a b "), (b"line\r\n", "line"), (b"two\nlines\n\n", "two\nlines\n")]
)
def test_only_the_last_line_break_of_a_value_is_left_out(
    aal: Callable[..., Ran], tmp_path: Path, given: bytes, kept: str
) -> None:
    aal("secret", "set", "KEY", "--overlay", "psyfi", stdin=given)
    assert Secrets(tmp_path / ".aal").for_overlay("psyfi", ["KEY"]) == {"KEY": kept}


def test_a_value_too_short_to_be_kept_out_of_logs_is_told(aal: Callable[..., Ran]) -> None:
    assert "too short" in aal("secret", "set", "PIN", stdin=b"1234").err
    assert "too short" not in aal("secret", "set", "KEY", stdin=VALUE.encode()).err


def test_of_a_variable_the_name_is_kept_and_stdin_is_left(aal: Callable[..., Ran], tmp_path: Path) -> None:
    ran = aal("secret", "set", "KEY", "--overlay", "psyfi", "--from-env", "THE_KEY", "--json", stdin=b"unread")
    assert ran.json == {"name": "KEY", "source": "secrets.json", "env": "THE_KEY", "overlays": ["psyfi"]}
    secrets = Secrets(tmp_path / ".aal", env={"THE_KEY": VALUE})
    assert secrets.for_overlay("psyfi", ["KEY"]) == {"KEY": VALUE}
    assert "unread" not in (tmp_path / ".aal" / "secrets.json").read_text()


def test_what_the_settings_declare_is_listed_and_not_changed(aal: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text(DECLARED)
    assert aal("secret", "list", "--json").json["secrets"] == [
        {"name": "THEIRS", "source": "aal.toml", "env": "THE_KEY", "overlays": ["psyfi"]}
    ]
    ran = aal("secret", "remove", "THEIRS")
    assert (ran.code, "stands in aal.toml" in ran.err) == (Exit.FAILED, True)


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        ("set KEY", b""),
        ("set KEY", b"\n"),
        ("set KEY", b"\xff"),
        ("set KEY", b"a\0b"),
        ("set PATH", b"value"),
        ("set A-B", b"value"),
        ("set KEY --overlay Not-One", b"value"),
        ("set KEY --from-env a-b", b"value"),
        ("allow KEY ../x", b""),
        ("set", b"value"),
    ],
)
def test_a_secret_that_cannot_be_is_wrong_usage_and_sets_nothing(
    aal: Callable[..., Ran], tmp_path: Path, arguments: str, stdin: bytes
) -> None:
    ran = aal("secret", *arguments.split(), stdin=stdin)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert not (tmp_path / ".aal" / "secrets.json").exists()


def test_a_secret_that_is_not_there_is_a_failure(aal: Callable[..., Ran]) -> None:
    for arguments in (["allow", "KEY", "psyfi"], ["deny", "KEY", "psyfi"], ["remove", "KEY"]):
        ran = aal("secret", *arguments)
        assert (ran.code, "there is no secret KEY" in ran.err) == (Exit.FAILED, True)


def test_a_value_is_in_no_argument_and_no_variable_of_the_process_that_sets_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "secret", "set", "KEY"]
    with subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(VALUE.encode())
        process.stdin.flush()
        looks = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        _, complaint = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, complaint
    assert not any(VALUE.encode() in look for look in looks)
    assert Secrets(tmp_path / ".aal").all()[0].name == "KEY"
