"""Every attempt of the table: by each kind of user, in each mode, in the phases that forbid it and that allow it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import provenance
from bus.model import Phase
from runners.kernel import ABI_OF_SCOPES, this_kernel
from tests.escape.attempts import ATTEMPTS
from tests.escape.overlays import PROGRAMS, name_of
from tests.escape.server import ORDINARY, Server, Try, User
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.escape.attempts import Attempt
    from tests.escape.overlays import Mode

    Answer = Mapping[str, Any]
    Of = Callable[[User], "Made"]

CAP_SYS_ADMIN = 21
IS_ROOT = os.geteuid() == 0
ROOT = User("root", 0)
USER = User("user", ORDINARY if IS_ROOT else os.geteuid())
CONFINED = User("user-without-namespaces", ORDINARY, namespaces=False)
USERS = (ROOT, USER, CONFINED)
EVERYTHING = os.environ.get("ESCAPE") == "all"
"""Every attempt by every user, in every mode and phase: some minutes."""

ONE_SHOT: tuple[Mode, ...] = ("fork", "spawn")
OF_NAMESPACES = {"processes", "limits"}
"""The rights that are held otherwise where there is no namespace."""

REFUSALS = {"EPERM", "EACCES"}
OF_THE_MACHINERY = {"kernel", "telling", "__init__"}
SCOPES = {"fork": "call", "spawn": "call", "worker": "pool"}


def tries_of(user: User) -> Iterator[Try]:
    """Without `ESCAPE=all` root makes each attempt in every phase once, the others in two, each in the other mode."""
    for number, attempt in enumerate(ATTEMPTS):
        if attempt.needs == "namespace" and not user.namespaces:
            continue
        if EVERYTHING:
            modes, phases = ONE_SHOT, attempt.forbidden + attempt.allowed
        elif user is ROOT:
            modes, phases = (ONE_SHOT[number % 2],), attempt.forbidden + attempt.allowed
        elif user is USER or attempt.right in OF_NAMESPACES:
            modes, phases = (ONE_SHOT[1 - number % 2],), attempt.forbidden[:1] + attempt.allowed[:1]
        else:
            continue
        worker: tuple[Mode, ...] = ("worker",) if attempt.worker and (EVERYTHING or user is USER) else ()
        yield from (Try(attempt, mode, phase) for mode in modes + worker for phase in phases)


def told(value: object) -> str:
    if isinstance(value, User):
        return value.name
    if isinstance(value, Try):
        return f"{name_of(value.attempt, value.mode)}-{value.phase}"
    return str(value)


def came_of(answer: Answer) -> str:
    """`done`, `nothing`, the name of an error; else the code of the call."""
    result = answer["result"]
    if not isinstance(result, dict):
        return str(answer["code"])
    return str(result.get("errno") or next(iter(result)))


class Made:
    """What came of all attempts of one user."""

    def __init__(self, user: User) -> None:
        with Server(user, tries_of(user)) as server:
            place = server.place
            self.answers = server.make_all()
            self.running = place.marked_processes()
            self.lacks = place.lacks
            self.before, self.after = server.before, place.seen_outside()
            self.records = {
                line["request_id"]: line for line in provenance.iter_lines(place.ledger) if "result_hash" in line
            }


def started_by(user: User) -> User:
    """Skips where this process cannot start a server of that user."""
    if user.uid != os.geteuid() and not (IS_ROOT and has_all_of_root()):
        pytest.skip(f"only root with all its capabilities can go on as {user.name}")
    return user


def has_all_of_root() -> bool:
    """Of a container it may have but a few."""
    effective = int(re.findall(r"CapEff:\t(\w+)", Path("/proc/self/status").read_text())[0], 16)
    return bool(effective & 1 << CAP_SYS_ADMIN)


@pytest.fixture(scope="module")
def made() -> Of:
    """The attempts of a user, made when they are first asked for."""
    known: dict[User, Made] = {}

    def of(user: User) -> Made:
        if user not in known:
            known[user] = Made(started_by(user))
        return known[user]

    return of


def is_through(attempt: Attempt, found: str) -> bool:
    """It was done, or the kernel refused only what it was asked for, not that it was asked."""
    is_error = found.startswith("E") and not found.startswith("ERR_")
    return found == "done" or (is_error and found not in attempt.refused | REFUSALS)


def gets_through(user: User, attempt: Attempt) -> bool:
    return attempt.unheld == "everybody" or (attempt.unheld == "root" and user is ROOT and has_all_of_root())


@pytest.mark.parametrize(("user", "try_"), [(user, try_) for user in USERS for try_ in tries_of(user)], ids=told)
def test_what_a_phase_forbids_fails_and_what_it_allows_works(user: User, try_: Try, made: Of) -> None:
    found = made(user)
    if try_.attempt.needs in found.lacks:
        pytest.skip(f"this machine has no {try_.attempt.needs}")
    answer = found.answers[try_]
    if try_.attempt.right not in answer["sandbox"]["enforced"]:
        pytest.skip("; ".join(answer["sandbox"]["missing"]))
    if try_.phase in try_.attempt.allowed:
        assert came_of(answer) == "done", answer
    elif try_.attempt.code != "OK":
        assert answer["code"] == try_.attempt.code, answer
    else:
        assert came_of(answer) in try_.attempt.refused, answer


@pytest.mark.parametrize("user", USERS, ids=told)
def test_the_record_says_what_was_held(user: User, made: Of) -> None:
    found = made(user)
    for try_, answer in found.answers.items():
        sandbox = found.records[answer["request_id"]]["sandbox"]
        assert sandbox == answer["sandbox"]
        assert (sandbox["mode"], sandbox["scope"]) == ("best-effort", SCOPES[try_.mode]), told(try_)
        named = {*sandbox["enforced"], *(missing.partition(":")[0] for missing in sandbox["missing"])}
        assert try_.attempt.right in named, told(try_)


@pytest.mark.skipif(this_kernel().landlock_abi < ABI_OF_SCOPES, reason="Landlock of this kernel has no scopes")
@pytest.mark.parametrize("user", [ROOT, USER], ids=told)
def test_a_kernel_that_has_it_all_misses_nothing(user: User, made: Of) -> None:
    found = made(user)
    if "namespace" in found.lacks:
        pytest.skip("this kernel gives no namespaces")
    missed = {missing: told(try_) for try_, answer in found.answers.items() for missing in answer["sandbox"]["missing"]}
    assert missed == {}


@pytest.mark.parametrize("user", USERS, ids=told)
def test_nothing_of_others_has_changed_after_all_attempts(user: User, made: Of) -> None:
    found = made(user)
    assert found.after == found.before


@pytest.mark.parametrize("user", USERS, ids=told)
def test_nothing_runs_on_after_its_answer(user: User, made: Of) -> None:
    assert made(user).running == []


def test_every_attempt_gets_through_where_nothing_is_held() -> None:
    """So that none of them is one that cannot succeed; but those that would do harm, or that no server lets through."""
    user = ROOT if IS_ROOT else USER
    tries = [Try(attempt, "fork", Phase.ASCEND) for attempt in ATTEMPTS if gets_through(user, attempt)]
    with Server(user, tries, sandbox="off") as server:
        found = {try_.attempt: came_of(answer) for try_, answer in server.make_all().items()}
        lacks = server.place.lacks
    stuck = {a.name: what for a, what in found.items() if a.needs not in lacks and not is_through(a, what)}
    assert found
    assert stuck == {}


def test_every_deed_stands_in_the_table() -> None:
    deeds = {attempt.deed for attempt in ATTEMPTS} | {"processes.wait_for_end"}
    written = {
        f"{file.stem}.{name}"
        for file in PROGRAMS.glob("*.py")
        if file.stem not in OF_THE_MACHINERY
        for name in re.findall(r"^def ([a-z]\w*)\((?:_|facts): Facts\)", file.read_text(), re.MULTILINE)
    }
    assert written == deeds


def test_no_two_attempts_have_one_name() -> None:
    names = [attempt.name for attempt in ATTEMPTS]
    assert len(names) == len(set(names))


def test_every_promise_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPO / "SECURITY.md").read_text()))
    tests = "\n".join(file.read_text() for file in (REPO / "tests").rglob("test_*.py"))
    assert named
    assert named - set(re.findall(r"def (test_\w+)", tests)) == set()
