"""`aal overlays logs`: the last lines, and those that come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from bus import cli
from bus.console import Exit
from runners.logs import OverlayLogs
from tests.support import PATIENCE_S, REPO, add_overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typer.testing import Result

NOON = 1_769_860_800.25
STAMP = "2026-01-31T12:00:00.250Z"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("AAL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[OverlayLogs]:
    """The logs of a folder with the overlay `echo`."""
    add_overlay(tmp_path / "overlays")
    logs = OverlayLogs(tmp_path / "logs/overlays", max_bytes=200, clock=lambda: NOON)
    yield logs
    logs.close()


@pytest.fixture
def run(tmp_path: Path, logs: OverlayLogs) -> Callable[..., Result]:
    """Runs `aal overlays logs ...`."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, ["-C", str(tmp_path), "overlays", "logs", *arguments])

    return run


def test_the_last_lines_come_oldest_first(run: Callable[..., Result], logs: OverlayLogs) -> None:
    logs.append("echo", b"1\n2\n3\n")
    ran = run("echo", "-n", "2")
    assert (ran.exit_code, ran.stdout) == (Exit.OK, f"{STAMP} 2\n{STAMP} 3\n")


def test_lines_are_safe_for_a_terminal(run: Callable[..., Result], logs: OverlayLogs) -> None:
    logs.append("echo", b"\x1b]0;title\x07 \xff\n")
    assert run("echo").stdout == f"{STAMP} \\x1b]0;title\\x07 \ufffd\n"


def test_programs_get_one_object_a_line(run: Callable[..., Result], logs: OverlayLogs) -> None:
    logs.append("echo", b"two words\n\n")
    assert [json.loads(line) for line in run("echo", "--json").stdout.splitlines()] == [
        {"time": STAMP, "text": "two words"},
        {"time": STAMP, "text": ""},
    ]


def test_an_overlay_without_a_log_says_so(run: Callable[..., Result]) -> None:
    ran = run("echo")
    assert (ran.exit_code, ran.stdout) == (Exit.OK, "echo has no log yet; none of its programs has written to stderr\n")
    assert run("echo", "--json").stdout == ""


@pytest.mark.parametrize("name", ["ehco", "../echo", ""])
def test_an_unknown_overlay_is_told_with_code_and_hint(run: Callable[..., Result], name: str) -> None:
    ran = run(name)
    assert (ran.exit_code, ran.stdout) == (Exit.FAILED, "")
    assert "ERR_" in ran.stderr
    assert "hint: " in ran.stderr


def test_a_count_that_is_none_is_usage(run: Callable[..., Result]) -> None:
    assert run("echo", "-n", "-1").exit_code == Exit.USAGE


def test_following_goes_on_across_rotations_until_ctrl_c(tmp_path: Path, logs: OverlayLogs) -> None:
    logs.append("echo", b"begin\n")
    program = f"from bus import cli; cli.main(['-C', {str(tmp_path)!r}, 'overlays', 'logs', 'echo', '-f', '-n', '1'])"
    aal = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with aal:
        try:
            assert aal.stdout is not None
            assert aal.stderr is not None
            assert aal.stdout.readline() == f"{STAMP} begin\n".encode()
            for number in range(3):
                logs.append("echo", b"line %d\n" % number * 5)
                assert [aal.stdout.readline() for _ in range(5)] == [f"{STAMP} line {number}\n".encode()] * 5
            aal.send_signal(signal.SIGINT)
            assert aal.wait(PATIENCE_S) == Exit.OK
            assert aal.stdout.read() == aal.stderr.read() == b""
        finally:
            aal.kill()
