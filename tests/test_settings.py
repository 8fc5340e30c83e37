"""Settings: where each may stand, which source wins, and what stops the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bus import settings as bus_settings
from bus.errors import SettingError
from bus.settings import DeclaredSecret, Settings, explain, load, stores_payload, table

# Each setting: a value as TOML, the same as text, and what is read; then values that cannot be, as TOML.
EXAMPLES: dict[str, tuple[str, str, Any, list[str]]] = {
    "host": ('"127.0.0.2"', "127.0.0.2", "127.0.0.2", ["1", "true"]),
    "port": ("9000", "9000", 9000, ["-1", "65536", "80.5", '"http"', "true"]),
    "overlays": ('"/srv/o"', "/srv/o", "/srv/o", ['""', "1", "true"]),
    "logs": ('"/srv/l"', "/srv/l", "/srv/l", ['""', "1", "true"]),
    "state": ('"/srv/s"', "/srv/s", "/srv/s", ['""', "1", "true"]),
    "profiles": ('"/srv/p"', "/srv/p", "/srv/p", ['""', "1", "true"]),
    "slots": ("8", "8", 8, ["0", "4097", '"many"', "1.5"]),
    "admission": ('"slots"', "slots", "slots", ['"none"', "1"]),
    "memory_mb": ("2048", "2048", 2048, ["-1", "1000000001", "1.5"]),
    "eviction_retries": ("0", "0", 0, ["-1", "101"]),
    "queue_limit": ("0", "0", 0, ["-1", "100001"]),
    "timeout_s": ("2.5", "2.5", 2.5, ["0", "86401", '"soon"', "nan"]),
    "kill_grace_s": ("1", "1", 1.0, ["-1", "61", "inf"]),
    "helper_idle_s": ("0.1", "0.1", 0.1, ["0", "86401"]),
    "drain_s": ("0", "0", 0.0, ["-1", "3601"]),
    "max_body_mb": ("0.5", "0.5", 0.5, ["0", "1025"]),
    "max_output_mb": ("32", "32", 32.0, ["0", "1025"]),
    "pass_env": ('"A, B"', "A, B", "A, B", ["1", "[]"]),
    "fsync": ('"never"', "never", "never", ['"sometimes"', "true"]),
    "ledger_segment_mb": ("0.5", "0.5", 0.5, ["-1", "1048577", "nan"]),
    "degrade": ('"all"', "all", "all", ['"none"', "1"]),
    "stress_period_s": ("0.1", "0.1", 0.1, ["0", "61"]),
    "dev_log_payload": ("true", "1", True, ['"maybe"', "2"]),
    "sandbox": ('"enforce"', "enforce", "enforce", ['"on"', "true"]),
    "trusted": ('"a, b-c"', "a, b-c", "a, b-c", ['"A B"', "[]"]),
    "cgroup": ('"off"', "off", "off", ['"on"', "1"]),
    "scratch_local": ('"/srv/x"', "/srv/x", "/srv/x", ["1", "true", '"~no-such-user-here/x"', '"' + 300 * "x" + '"']),
    "scratch_extended": (
        '"/srv/x"',
        "/srv/x",
        "/srv/x",
        ["1", "true", '"~no-such-user-here/x"', '"' + 300 * "x" + '"'],
    ),
    "scratch_cold": ('"/srv/x"', "/srv/x", "/srv/x", ["1", "true", '"~no-such-user-here/x"', '"' + 300 * "x" + '"']),
    "scratch_mb": ("1", "1", 1, ["0", "1048577"]),
    "scratch_extended_mb": ("1", "1", 1, ["0", "1048577"]),
    "scratch_cold_mb": ("1", "1", 1, ["0", "1048577"]),
    "max_processes": ("1", "1", 1, ["0", "1.5"]),
    "local_phases": ('"OPEN,CLEAR"', "OPEN,CLEAR", "OPEN,CLEAR", ['"open"', '"OPEN SEAL"']),
    "hosts": ('"bus.lan, [fd00::1]"', "bus.lan, [fd00::1]", "bus.lan, [fd00::1]", ['"http://bus"', '"a b"']),
    "origins": ('"https://a.org:8"', "https://a.org:8", "https://a.org:8", ['"a.org"', '"https://a.org/x"']),
    "targets": ('"a.org,b:80"', "a.org,b:80", "a.org,b:80", ['"http://a.org"', '"a/b"']),
    "client_timeout_s": ("1", "1", 1.0, ["0", "3601"]),
    "log_level": ('"debug"', "debug", "debug", ['"loud"', "10"]),
}
NO_SETTINGS = {"secrets", "file"}
BAD = [(name, bad) for name, (_, _, _, bads) in EXAMPLES.items() for bad in bads]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_setting_is_read_from_the_file(name: str, tmp_path: Path) -> None:
    toml, _, value, _ = EXAMPLES[name]
    (tmp_path / "aal.toml").write_text(f"{name} = {toml}\n")
    assert as_read(load(tmp_path, {}), name) == value


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_setting_is_read_from_the_environment(name: str, tmp_path: Path) -> None:
    _, text, value, _ = EXAMPLES[name]
    assert as_read(load(tmp_path, {f"AAL_{name.upper()}": text}), name) == value


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_setting_is_read_from_the_command_line(name: str, tmp_path: Path) -> None:
    value = EXAMPLES[name][2]
    assert as_read(load(tmp_path, {}, {name: value}), name) == value


def as_read(settings: Settings, name: str) -> Any:
    value = getattr(settings, name)
    return str(value) if name in {"overlays", "logs", "state", "profiles"} else value


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_a_value_that_cannot_be_stops_the_start_and_says_what_is_allowed(name: str, bad: str, tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text(f"{name} = {bad}\n")
    with pytest.raises(SettingError) as refusal:
        load(tmp_path, {})
    (fault,) = refusal.value.faults
    assert fault.path == f"aal.toml: {name}"
    assert fault.found
    assert fault.allowed
    assert refusal.value.code == "ERR_SETTING"


@pytest.mark.parametrize("name", ["port", "timeout_s", "dev_log_payload", "host"])
def test_a_number_too_long_to_spell_is_refused_like_any_other(name: str, tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text(f"{name} = 0x1{'0' * 5000}\n")
    with pytest.raises(SettingError, match="thousands of digits"):
        load(tmp_path, {})


@pytest.mark.parametrize("name", ["port", "timeout_s", "slots"])
def test_a_text_of_too_many_digits_is_refused_like_any_other(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"environment: {name}"):
        load(tmp_path, {f"AAL_{name.upper()}": "1" * 5000})


@pytest.mark.parametrize("name", ["host", "overlays", "logs", "state", "profiles", "pass_env"])
def test_a_text_that_holds_a_nul_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text(f'{name} = "a\\u0000b"\n')
    with pytest.raises(SettingError, match=f"aal.toml: {name}: found 'a"):
        load(tmp_path, {})


def test_a_path_with_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path, {"AAL_LOGS": "x/" + "y" * 255}).logs.name == "y" * 255
    with pytest.raises(SettingError, match="environment: logs"):
        load(tmp_path, {"AAL_LOGS": "x/" + "\u00e4" * 128})


def test_the_home_of_a_user_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="environment: logs: found '~no-such-user-here/logs'"):
        load(tmp_path, {"AAL_LOGS": "~no-such-user-here/logs"})


def test_every_setting_has_examples_here_and_is_in_the_table() -> None:
    names = [field.name for field in dataclasses.fields(Settings) if field.name not in NO_SETTINGS]
    assert list(EXAMPLES) == names == [row.name for row in table()]
    assert all(row.env == f"AAL_{row.name.upper()}" and row.help for row in table())


def test_the_defaults_are_values_that_may_be_given() -> None:
    for field in dataclasses.fields(Settings):
        assert field.name in NO_SETTINGS or field.metadata["check"](field.default)


def test_the_file_of_the_settings_is_known_whether_it_is_there_or_not_and_is_no_setting(tmp_path: Path) -> None:
    assert load(tmp_path, {}).file == tmp_path / "aal.toml"
    with pytest.raises(SettingError, match="AAL_FILE"):
        load(tmp_path, {"AAL_FILE": "/etc/passwd"})


def test_secrets_are_declared_in_the_file_by_the_variable_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text('[secrets]\nKEY = {env = "MY_KEY", overlays = ["psyfi"]}\n')
    settings, rows = explain(tmp_path, {})
    assert settings.secrets == (DeclaredSecret("KEY", "MY_KEY", ("psyfi",)),)
    assert "secrets" not in [row.name for row in rows]


@pytest.mark.parametrize(
    "text",
    ["secrets = 1", '[secrets]\nKEY = "my value"', '[secrets]\n"A B" = {env = "X", overlays = []}',
     '[secrets]\nKEY = {env = "X"}', '[secrets]\nKEY = {env = 1, overlays = ["my value"]}'],
)  # fmt: skip
def test_a_secret_declared_in_another_form_is_refused_without_its_value(tmp_path: Path, text: str) -> None:
    (tmp_path / "aal.toml").write_text(text)
    with pytest.raises(SettingError, match=r"aal\.toml: secrets") as caught:
        load(tmp_path, {})
    assert "my value" not in str(caught.value)


def test_secrets_are_no_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="AAL_SECRETS"):
        load(tmp_path, {"AAL_SECRETS": "x"})


def test_the_later_source_wins(tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text("slots = 2\nqueue_limit = 2\nport = 2\n")
    settings, rows = explain(tmp_path, {"AAL_SLOTS": "3", "AAL_QUEUE_LIMIT": "3"}, {"slots": 4, "port": None})
    assert (settings.slots, settings.queue_limit, settings.port) == (4, 3, 2)
    sources = {row.name: (row.source, row.value) for row in rows}
    assert sources["slots"] == ("command line", 4)
    assert sources["queue_limit"] == ("environment", 3)
    assert sources["port"] == ("aal.toml", 2)
    assert sources["drain_s"] == ("default", 10.0)


def test_an_unknown_name_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text("slot = 2\n")
    with pytest.raises(SettingError) as refusal:
        load(tmp_path, {"AAL_FSNYC": "never", "AAL_XYZZY": "1", "OTHER": "1"})
    said = {fault.path: fault.allowed for fault in refusal.value.faults}
    assert said == {
        "aal.toml: slot": "slots",
        "environment: AAL_FSNYC": "AAL_FSYNC",
        "environment: AAL_XYZZY": "the names that aal config shows",
    }


def test_every_fault_of_every_source_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text('fsync = "later"\nnosuch = 1\n')
    with pytest.raises(SettingError) as refusal:
        load(tmp_path, {"AAL_PORT": "x"}, {"slots": 0})
    assert len(refusal.value.faults) == 4
    assert all(fault.path in refusal.value.detail for fault in refusal.value.faults)


@pytest.mark.parametrize(
    "text",
    [
        b"port = ",
        b"\xff\xfe",
        b"port = 1\nport = 2",
        b"port = " + 5000 * b"1",
        pytest.param(b"port = " + 5000 * b"[", id="deep"),
    ],
)
def test_a_file_that_is_no_toml_stops_the_start(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_bytes(text)
    with pytest.raises(SettingError, match=r"aal\.toml: found .*allowed: a readable TOML file"):
        load(tmp_path, {})


def test_a_folder_in_the_place_of_the_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "aal.toml").mkdir()
    with pytest.raises(SettingError, match="a readable TOML file"):
        load(tmp_path, {})


def test_paths_are_absolute_and_relative_ones_start_at_the_working_folder(tmp_path: Path) -> None:
    settings = load(tmp_path, {"AAL_LOGS": "var/../logs2", "AAL_STATE": "/srv/state"})
    assert settings.overlays == tmp_path / "overlays"
    assert settings.logs == tmp_path / "var/../logs2"
    assert str(settings.state) == "/srv/state"
    assert settings.ledger == settings.logs / "provenance.jsonl"


def test_folders_for_scratch_are_absolute_as_well_and_none_where_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"AAL_SCRATCH_LOCAL": "", "AAL_SCRATCH_EXTENDED": "fast", "AAL_SCRATCH_COLD": "~/slow"}
    settings = load(tmp_path, given)
    assert settings.scratch_set() == {"EXTENDED": tmp_path / "fast", "COLD": Path("/home/somebody/slow")}
    assert settings.scratch == tmp_path / ".aal/scratch"


def test_without_a_folder_the_current_one_is_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AAL_SLOTS", "5")
    settings = load()
    assert (settings.overlays, settings.slots) == (tmp_path / "overlays", 5)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(load(tmp_path, {"AAL_LOGS": "~/logs"}).logs) == "/home/somebody/logs"


@pytest.mark.parametrize(
    ("text", "configured", "stores"),
    [(None, False, False), (None, True, True), ("1", False, True), ("true", False, True), ("0", True, False)],
)
def test_whether_payloads_are_stored_is_read_anew_at_each_call(
    text: str | None, configured: bool, stores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(dev_log_payload=configured)
    monkeypatch.delenv("AAL_DEV_LOG_PAYLOAD", raising=False)
    assert stores_payload(settings) is configured
    if text is not None:
        monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", text)
    assert stores_payload(settings) is stores


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "1"])
def test_truth_may_be_spelled_in_many_ways(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, {"AAL_DEV_LOG_PAYLOAD": text}).dev_log_payload is True


@pytest.mark.parametrize("text", ["false", "FALSE", "no", "off", "0", ""])
def test_untruth_too(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, {"AAL_DEV_LOG_PAYLOAD": text}).dev_log_payload is False


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.1", False), ("::", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback_is_told_from_other_addresses(host: str, loopback: bool) -> None:
    assert Settings(host=host).is_loopback is loopback


def test_sizes_are_given_in_mib_and_names_with_commas() -> None:
    settings = Settings(max_body_mb=0.5, max_output_mb=2, pass_env=" A,,B , ")
    assert (settings.max_body_bytes, settings.max_output_bytes) == (524_288, 2_097_152)
    assert settings.listed("pass_env") == ("A", "B")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


def test_the_prefix_and_the_file_are_named_once() -> None:
    assert (bus_settings.PREFIX, bus_settings.FILE) == ("AAL_", "aal.toml")


def test_the_token_of_a_client_is_no_setting_and_no_fault(tmp_path: Path) -> None:
    _, rows = explain(tmp_path, {bus_settings.TOKEN: "aal_secret"})
    assert "aal_secret" not in str(rows)
    with pytest.raises(SettingError):
        explain(tmp_path, {"AAL_TOKENS": "aal_secret"})
