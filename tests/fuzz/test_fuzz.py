"""The short version of the campaign, and that the campaign itself can fail."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st

from tests.fuzz import __main__ as command
from tests.fuzz import campaign
from tests.fuzz.campaign import HangError, Probe, Target
from tests.fuzz.targets import TARGETS
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CASES = 2000
"""Of all targets together; the campaign has more."""

SEED = 20_260_101
ATHERIS_RUNS = 2000
LIMIT_S = 120


SHARES = list(zip(TARGETS, campaign.share(TARGETS, CASES), strict=True))


@pytest.mark.parametrize(("target", "cases"), SHARES, ids=[target.name for target in TARGETS])
def test_hostile_input_gets_an_answer(target: Target, cases: int) -> None:
    if target.name == "operations":
        pytest.importorskip("schemathesis", reason="pip install -e '.[dev]' brings it")
    result = campaign.run(target, cases, SEED)
    assert result.held, "\n".join(command.tell(result))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="pip install -e '.[dev]' brings it, where it can"
)
def test_frames_that_atheris_finds_get_an_answer() -> None:
    argv = [sys.executable, "tests/fuzz/fuzz_frames.py", f"-atheris_runs={ATHERIS_RUNS}"]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Done {ATHERIS_RUNS}" in done.stderr


def a_target(check: Callable[[int], str], *must: str) -> Target:
    @contextlib.contextmanager
    def opened() -> Iterator[Probe]:
        yield Probe(st.integers(0, 1000), check)

    return Target("some", "numbers", 1, opened, frozenset(must))


def refuses_large(number: int) -> str:
    if number > 10:
        raise ValueError(number)
    return "small"


def test_an_exception_that_leaves_a_reader_is_told_with_its_smallest_case() -> None:
    result = campaign.run(a_target(refuses_large), 200, SEED)
    assert not result.held
    assert "the case: 11" in (result.failure or "")


def test_a_case_that_does_not_end_is_a_failure() -> None:
    with pytest.raises(HangError), campaign.limit(0.01):
        threading.Event().wait()


def test_an_outcome_that_never_came_out_is_no_success() -> None:
    result = campaign.run(a_target(lambda _: "small", "small", "large"), 200, SEED)
    assert (result.failure, result.unseen, result.held) == (None, ["large"], False)


def test_the_cases_are_shared_out_by_weight_and_none_is_lost() -> None:
    parts = campaign.share(TARGETS, 50_000)
    assert sum(parts) == 50_000
    assert min(parts) > 0


def test_the_names_of_targets_are_distinct() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_the_command_says_what_was_counted_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--cases", "150", "--only", "runes", "--seed", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "150 cases, seed 1"
    assert "refused" in said[1]
    assert said[-1].startswith("150 cases in ")
    assert said[-1].endswith(": held")


def test_the_command_refuses_a_target_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "rones"])
    assert "rones unknown" in capsys.readouterr().err
