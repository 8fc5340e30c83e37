"""The command line: what each command prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import pytest
from aos_context.config import DEFAULT_CONFIG

from bus.codehash import code_hash
from tests.context.conftest import OVERLAY
from tests.context.served import PATIENCE_S, environment, run_cli, serving

if TYPE_CHECKING:
    from pathlib import Path


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs in which the demo was played."""
    folder = tmp_path_factory.mktemp("cli") / "runs"
    played = run_cli("demo", "--root", str(folder))
    assert (played.returncode, played.stderr) == (0, "")
    steps = [line.partition(" ")[0] for line in played.stdout.splitlines()]
    assert steps[:9] == [
        "boot", "update", "stale", "propose", "commit", "milestone", "search", "snapshot", "load",
    ]  # fmt: skip
    assert "Parse the logs." in played.stdout
    assert "## Memory" in played.stdout
    return folder


def listed(root: Path) -> list[str]:
    said = run_cli("runs", "--root", str(root), "--json")
    return [one["run_id"] for one in json.loads(said.stdout)]


def test_the_demo_can_be_played_again_on_the_same_folder(root: Path) -> None:
    before = listed(root)
    assert run_cli("demo", "--root", str(root)).returncode == 0
    assert len(listed(root)) == len(before) + 2


def test_the_root_may_come_from_the_environment(root: Path) -> None:
    for name in ("AOS_CONTEXT_ROOT", "OVERLAY_STATE"):
        said = run_cli("runs", variables={name: str(root)})
        assert len(said.stdout.splitlines()) == len(listed(root))


def test_a_run_is_briefed_packed_and_loaded(root: Path) -> None:
    run_id = listed(root)[0]
    brief = run_cli("brief", run_id, "--root", str(root), "--budget", "300", "--query", "formats")
    assert brief.returncode == 0
    assert "Parse the logs." in brief.stdout
    for folder, ending in (([], ".zip"), (["--folder"], "")):
        packed = run_cli("snapshot", run_id, "--root", str(root), *folder).stdout.strip()
        assert packed.endswith(ending)
        loaded = run_cli("load", packed, "--root", str(root.parent / f"other{ending}"))
        assert loaded.stdout.startswith(f"{run_id} goes on from ")
        assert listed(root.parent / f"other{ending}") == [run_id]


def test_a_run_is_checked_whole_and_the_file_that_was_changed_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    assert run_cli("demo", "--root", str(folder)).returncode == 0
    [run_id] = [one for one in listed(folder) if (folder / one / "resume").is_dir()]
    sound = run_cli("check", run_id, "--root", str(folder))
    assert (sound.returncode, sound.stderr) == (0, "")
    found = f"{run_id}: 8 events and 1 episodes, all as they were written; "
    assert sound.stdout == f"{found}of the events from line 7 on, which are in no episode yet, only the form is known\n"
    ledger = folder / run_id / "ledger" / "run.v2.1.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole.replace(b'"actor":null', b'"actor":"eve"', 1))
    rewritten = run_cli("check", run_id, "--root", str(folder))
    assert (rewritten.returncode, rewritten.stdout) == (1, "")
    assert "run.v2.1.jsonl: a line up to 6 is not what it was at episode 1" in rewritten.stderr
    ledger.write_bytes(whole)
    (folder / run_id / "episodes" / "episode_000001.v2.1.json").unlink()
    said = run_cli("check", run_id, "--root", str(folder))
    assert (said.returncode, said.stdout) == (1, "")
    assert "episode_000001" in said.stderr


def test_a_demo_whose_reader_has_gone_is_played_to_its_end(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with closing(os.fdopen(writer, "wb")) as out:
        played = subprocess.run(
            [sys.executable, "-W", "error", "-m", "aos_context.cli", "demo", "--root", str(tmp_path / "runs")],
            cwd=OVERLAY,
            env=environment(),
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
            check=False,
        )
    assert (played.returncode, played.stderr) == (0, b"")
    assert len(listed(tmp_path / "runs")) == 2


def test_what_fails_is_one_sentence_and_status_1(root: Path) -> None:
    for arguments in (["brief", "nobody"], ["snapshot", "nobody"], ["load", "nothing.zip"]):
        failed = run_cli(*arguments, "--root", str(root))
        assert failed.returncode == 1
        assert failed.stderr.startswith("aos_context: ")
        assert "Traceback" not in failed.stderr
    setting = run_cli("runs", "--root", str(root), variables={"AOS_CONTEXT_TESTING": "perhaps"})
    assert (setting.returncode, "AOS_CONTEXT_TESTING" in setting.stderr) == (1, True)
    assert run_cli("fly").returncode == 2


def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    said = subprocess.run(
        [sys.executable, "-S", "-m", "aos_context.cli", "runs"],
        cwd=OVERLAY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert "jsonschema-rs" in said.stderr
    assert "pip install -r requirements.txt" in said.stderr


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as service:
        said = run_cli("serve", "--port", str(service.port), "--root", str(tmp_path / "runs"))
        assert said.returncode == 1
        assert "cannot listen on" in said.stderr


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "http", "1_0", "9" * 5000])
def test_a_port_that_cannot_be_is_a_wrong_command_line(port: str) -> None:
    said = run_cli("serve", f"--port={port}")
    assert (said.returncode, "allowed: 0 to 65535" in said.stderr) == (2, True)
    assert "Traceback" not in said.stderr


@needs_ipv6
def test_an_address_of_ipv6_is_served_and_said_in_brackets(tmp_path: Path) -> None:
    with serving(tmp_path / "runs", "--host", "::1") as service:
        connection = HTTPConnection("::1", service.port, timeout=PATIENCE_S)
        with closing(connection):
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
        said = run_cli("serve", "--host", "::1", "--port", str(service.port), "--root", str(tmp_path / "runs"))
        assert f"cannot listen on [::1]:{service.port}" in said.stderr


@pytest.mark.parametrize("arguments", [["--budget", "0"], ["--budget", "-5"], ["--query", "x" * 10_001]])
def test_a_command_takes_what_the_service_would_take(root: Path, arguments: list[str]) -> None:
    said = run_cli("brief", listed(root)[0], "--root", str(root), *arguments)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("aos_context: brief request: $.")
    refused = run_cli("load", str(root / "none.zip"), "--root", str(root), "--run-id", "a/b")
    assert refused.stderr.startswith("aos_context: load request: $.new_run_id")


def test_the_help_has_the_default_of_the_settings() -> None:
    assert f"default: {DEFAULT_CONFIG.brief_max_tokens}" in run_cli("brief", "--help").stdout


@pytest.mark.parametrize("arguments", [["runs"], ["brief", "r"], ["snapshot", "r"]])
def test_a_command_that_makes_no_run_makes_no_folder(tmp_path: Path, arguments: list[str]) -> None:
    said = run_cli(*arguments, "--root", str(tmp_path / "none"))
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith(f"aos_context: there is no folder {tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_what_is_kept_inside_the_folder_does_not_change_the_hash_of_the_code(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".venv", "runs")
    folder = shutil.copytree(OVERLAY, tmp_path / "aos_context", ignore=ignored)
    before = code_hash(folder)
    assert run_cli("demo", "--root", str(folder / "runs")).returncode == 0
    assert (folder / "runs/memory.v2.1.sqlite").is_file()
    assert code_hash(folder) == before
    (folder / "aos_context/runs.py").write_text("")
    assert code_hash(folder) != before


def test_a_folder_that_cannot_be_made_ends_the_service(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run_cli("serve", "--port", "0", "--root", str(tmp_path / "file/runs"))
    assert said.returncode == 1
    assert str(tmp_path / "file") in said.stderr


def test_importing_the_application_reads_and_writes_nothing(tmp_path: Path) -> None:
    program = "import aos_context.api.main, os; print(os.listdir())"
    env = environment(PYTHONPATH=str(OVERLAY), AOS_CONTEXT_ROOT=os.fspath(tmp_path / "runs"))
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert said.stdout == "[]\n"
