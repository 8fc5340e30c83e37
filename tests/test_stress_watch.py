"""`aal stress --watch`: in a terminal, in a pipe, with a server and without."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from rich.style import Style

from bus.cli_stress import Screen
from bus.model import Phase
from bus.plot import AXIS, EIGHTHS, plot
from bus.stress_watch import Report, Watch
from bus.tokens import SCOPES, Tokens
from tests.support import PATIENCE_S, misfits, settings_in
from tests.test_serve import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT = 2000
"""Reports that a test looks at, at most, before what it waits for is said not to come."""


@contextlib.contextmanager
def watching(folder: Path, *options: str, stdout: int = subprocess.PIPE, **env: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bus.cli", "-C", str(folder), "stress", "--watch", "--period", "0.05", *options]
    env = {"PATH": "/usr/bin:/bin", "TERM": "xterm-256color", "AAL_STRESS_PERIOD_S": "0.05"} | env
    with subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True) as watch:
        try:
            yield watch
        finally:
            watch.kill()


def ended_by_ctrl_c(watch: subprocess.Popen[str]) -> None:
    watch.send_signal(signal.SIGINT)
    _, said = watch.communicate(timeout=PATIENCE_S)
    assert watch.returncode == 0
    assert "Traceback" not in said
    assert "Aborted" not in said


def objects(watch: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert watch.stdout is not None
    for _ in range(LIMIT):
        yield json.loads(watch.stdout.readline())
    pytest.fail(f"not among {LIMIT} reports")


def test_without_a_server_it_samples_by_itself_and_says_so_a_line_a_sample(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        assert watch.stderr.readline() == "no server of this folder runs: sampled here\n"
        for _ in range(3):
            line = watch.stdout.readline()
            assert re.match(r"\d\d:\d\d:\d\d  stress \d\.\d{3} [A-Z]+  memory \d\.\d{3}  pressure ", line)
            assert "\x1b" not in line
        ended_by_ctrl_c(watch)
    assert list(tmp_path.iterdir()) == []


def test_programs_get_an_object_a_line_and_the_servers_as_long_as_there_is_one(tmp_path: Path) -> None:
    with watching(tmp_path, "--json") as watch:
        found = objects(watch)
        first = next(found)
        assert (first["server"], "scheduler" in first) == (None, False)
        with serving(tmp_path, stress_period_s="0.02") as (_, address):
            told = next(one for one in found if one["server"])
            assert told["server"] == f"http://{address}"
            assert told["scheduler"]["running"] == 0
            again = next(found)
            assert again["sampled"] > told["sampled"]
        last = next(one for one in found if one["server"] is None)
        assert "sampled here" in last["note"]
        for one in (first, told, again, last):
            assert misfits("stress", {name: one[name] for name in one.keys() - {"server", "note"}}) == []
        ended_by_ctrl_c(watch)


def test_a_server_that_wants_a_token_is_asked_with_it_and_without_it_says_what_is_missing(tmp_path: Path) -> None:
    token = Tokens(tmp_path / ".aal").create("boss", overlays=("*",), phases=tuple(Phase), scopes=SCOPES)[1]
    with serving(tmp_path, stress_period_s="0.02") as (_, address):
        with watching(tmp_path, "--json") as watch:
            found = next(objects(watch))
            assert (found["server"], "ERR_UNAUTHORIZED" in found["note"], "AAL_TOKEN" in found["note"]) == (
                None,
                True,
                True,
            )
        with watching(tmp_path, "--json", AAL_TOKEN=token) as watch:
            assert next(objects(watch))["server"] == f"http://{address}"


def test_one_look_is_the_servers_with_its_queue(tmp_path: Path) -> None:
    watch = Watch(settings_in(tmp_path))
    with serving(tmp_path, stress_period_s="0.02") as (_, address):
        report = watch.once()
        assert report.server == f"http://{address}"
        assert report.body["scheduler"]["waiting"] == 0
        assert report.history
    alone = watch.once()
    assert (alone.server, alone.history) == (None, ())


def test_in_a_terminal_it_is_a_plot_that_fits_and_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 110, 0, 0))
    with serving(tmp_path, stress_period_s="0.02") as (_, address), watching(tmp_path, stdout=theirs) as watch:
        os.close(theirs)
        shown = b""
        while shown.count(b"running") < 3:
            shown += os.read(ours, 65536)
        watch.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while piece := os.read(ours, 65536):
                shown += piece
        assert watch.wait(PATIENCE_S) == 0
        assert watch.stderr is not None
        assert watch.stderr.read() == ""
    os.close(ours)
    text = shown.decode()
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert f"the server at http://{address}" in plain
    assert set(EIGHTHS[1:]) & set(plain)
    assert max(map(len, plain.replace("\r", "\n").splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--period", "1"], "--watch"), (["--watch", "--period", "0"], "0.05")]
)
def test_a_period_that_cannot_be_is_refused_with_what_can(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "stress", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert said in ran.stderr


# The plot


def test_a_plot_has_its_newest_sample_at_the_right_in_eighths_of_rows() -> None:
    drawn = plot([(0.0, "green"), (0.5, "yellow"), (1.0, "red")], width=AXIS + 4, height=2)
    assert drawn.plain.splitlines() == ["1.00│   █", "0.50│ ▁██"]
    assert plot([(0.75, "red")] * 50, AXIS + 3, 2).plain.splitlines() == ["1.00│▄▄▄", "0.50│███"]


def test_a_plot_colours_each_column_by_its_band() -> None:
    drawn = plot([(0.1, "green"), (0.9, "red")], AXIS + 2, 1)
    console = Console(width=80)
    assert [drawn.get_style_at_offset(console, at).color for at in (AXIS, AXIS + 1)] == [
        Style.parse(colour).color for colour in ("green", "red")
    ]


@pytest.mark.parametrize("width", [12, 40, 80, 100, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_the_screen_fits_whatever_the_terminal(width: int, height: int) -> None:
    room = {"name": "cgroup /a/b", "total_mb": 4000, "used_mb": 1000}
    body = {"stress": 0.61, "band": "HIGH", "sources": {"memory": 0.61, "pressure": None}, "rooms": [room]}
    body |= {"free_mb": 3000.0, "sampled": 3, "scheduler": {"running": 1, "waiting": 2}}
    history = tuple({"stress": 0.3, "band": "MODERATE"} for _ in range(240))
    screen = Screen()
    screen.add(Report(body, "http://127.0.0.1:8000", history=history))
    console = Console(width=width, height=height, force_terminal=True)
    rendered = console.render_lines(screen, console.options.update(height=height), pad=False)
    texts = ["".join(segment.text for segment in line) for line in rendered]
    assert all(len(text) <= width for text in texts)
    assert texts[0].startswith("stress 0.61"[:width])
    assert len(screen.samples) == 240
    if width >= 80 and height >= 24:
        assert "waiting" in "".join(texts)
