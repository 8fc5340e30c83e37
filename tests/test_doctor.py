"""What `aal doctor` says of rights: found out by trying, in each phase, on this machine."""

from __future__ import annotations

import errno
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import doctor
from bus.policy import PHASES
from runners import cgroups, kernel, places, tiers, trial
from runners.base import TIERS, Rights
from runners.cgroups import Ground, UnavailableError
from runners.confinement import RIGHTS
from runners.kernel import this_kernel
from runners.trial import Found

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus.doctor import Finding
    from bus.settings import Settings
    from runners.trial import Findings

HELD = Found(allowed=False, enforced=True, by=("landlock",), found="elsewhere refused (EACCES)")
OPEN_WIDE = Found(allowed=False, enforced=False, by=(), found="TCP works, though not allowed; no filters")

holds_all = pytest.mark.skipif(
    this_kernel().landlock_abi < kernel.ABI_OF_SCOPES or this_kernel().no_seccomp is not None,
    reason="this kernel cannot hold every right",
)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a trial makes what it needs. Not in pytest's folder: the name of a Unix socket is short."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def findings(**found: Found) -> dict[str, Findings]:
    """Of one phase, in which all is held but what is given."""
    return {"CLEAR": {right: found.get(right, HELD) for right in RIGHTS}}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has a trial come to this, or fail with it."""

    def come_to(result: Any) -> None:
        async def find_out(_phases: object) -> Any:
            if isinstance(result, OSError):
                raise result
            return result

        monkeypatch.setattr(trial, "find_out", find_out)

    return come_to


def test_who_holds_calls_to_hard_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "find", lambda: Ground(Path("/tree/unit"), Path("/tree/unit")))
    assert doctor.memory_limit().found == "HARD is held by the kernel: cgroups (v2) in /tree/unit"
    assert doctor.memory_limit("off").found == "HARD is held by looking at the calls: AAL_CGROUP=off"


def test_why_the_kernel_does_not_hold_calls_to_hard_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Ground:
        raise UnavailableError("the bus is not alone")

    monkeypatch.setattr(cgroups, "find", refuse)
    finding = doctor.memory_limit()
    assert (finding.mark, finding.found) == ("ok", "HARD is held by looking at the calls: the bus is not alone")
    assert "Delegate=yes" in finding.hint


@holds_all
def test_each_phase_gives_what_its_row_of_the_table_says_and_all_else_was_refused(temporary: Path) -> None:
    found = doctor.try_rights()
    assert list(found) == [str(phase) for phase in PHASES]
    for phase, rule in PHASES.items():
        of = found[str(phase)]
        allowed = {right for right, one in of.items() if one.allowed}
        given = {"write": rule.write, "network": rule.network, "exec": rule.exec}
        assert allowed == {right for right, is_given in given.items() if is_given}, phase
        assert [right for right, one in of.items() if not (one.enforced and one.by)] == [], (phase, of)
        assert not any("though" in one.found for one in of.values()), of
    assert list(temporary.iterdir()) == []


async def test_a_trial_of_programs_that_nothing_holds_finds_that_out(temporary: Path) -> None:
    found = (await trial.find_out({"CLEAR": Rights()}, "off"))["CLEAR"]
    loose = {right for right, one in found.items() if not one.enforced}
    assert loose >= {"read", "write", "network", "exec", "limits"}
    assert "TCP works, though not allowed" in found["network"].found
    assert all(one.by == () for one in found.values())


@holds_all
async def test_what_a_phase_allows_and_yet_is_refused_is_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the right to write, in a plan that leaves out where."""
    all_places = places.places
    monkeypatch.setattr(places, "places", lambda *given: all_places(*given)._replace(write=()))
    found = (await trial.find_out({"OPEN": Rights(write=True)}))["OPEN"]["write"]
    assert (found.allowed, found.enforced) == (True, True)
    assert "state refused (EACCES), though allowed" in found.found


async def test_a_trial_whose_program_does_not_run_says_why(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PROGRAM", temporary / "program.py")
    (temporary / "program.py").write_text("raise SystemExit('no such luck')")
    with pytest.raises(OSError, match=r"in phase CLEAR: .*no such luck"):
        await trial.find_out({"CLEAR": Rights()})


def test_rights_that_are_held_are_a_finding_a_phase(tried: Callable[[Any], None]) -> None:
    tried(findings())
    assert [(one.name, one.mark) for one in doctor.rights()] == [("rights CLEAR", "ok")]


def test_a_right_that_is_not_held_is_a_warning_with_what_was_found() -> None:
    (finding,) = doctor.rights(findings(network=OPEN_WIDE))
    assert finding.mark == "warn"
    assert finding.found == "not held: network (TCP works, though not allowed; no filters)"
    assert "Linux 6.12" in finding.hint


def test_where_no_program_can_be_held_the_reason_is_found(tried: Callable[[Any], None]) -> None:
    tried(OSError(errno.EIO, "in phase OPEN: it ended at once"))
    (finding,) = doctor.rights()
    assert (finding.name, finding.mark) == ("rights", "fail")
    assert "it ended at once" in finding.found


def scratch_findings(settings: Settings, *, namespace: bool = True, **changes: Any) -> dict[str, Finding]:
    found = doctor.scratch(replace(settings, **changes), namespace=namespace)
    return {one.name.removeprefix("scratch "): one for one in found}


def test_each_tier_is_a_finding_with_its_place_its_file_system_and_what_is_free(settings: Settings) -> None:
    found = scratch_findings(settings)
    assert list(found) == list(TIERS)
    assert found["LOCAL"].mark == "ok"
    assert "memory of each helper's own (tmpfs), 256 MiB a call" in found["LOCAL"].found
    kind = tiers.file_system(settings.scratch)
    for tier, quota in (("EXTENDED", 1024), ("COLD", 4096)):
        assert found[tier].found.startswith(f"{settings.scratch} ({kind}), ")
        assert found[tier].found.endswith(f" MiB free, {quota} MiB a call")


def test_local_that_is_not_memory_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda _: "ext4")
    (settings.overlays.parent / "disk").mkdir()
    found = scratch_findings(settings, scratch_local=str(settings.overlays.parent / "disk"))["LOCAL"]
    assert (found.mark, "not memory" in found.found, "AAL_SCRATCH_LOCAL" in found.hint) == ("warn", True, True)
    monkeypatch.setattr(tiers, "shared_memory_is_usable", lambda: False)
    assert scratch_findings(settings, namespace=False)["LOCAL"].mark == "warn"


def test_a_place_that_is_set_and_not_there_is_a_warning_and_one_that_cannot_be_written_a_failure(
    settings: Settings,
) -> None:
    home = settings.overlays.parent
    (home / "file").write_text("no folder")
    given: dict[str, Any] = {
        "scratch_cold": str(home / "unmounted"),
        "scratch_cold_mb": 1,
        "scratch_extended": str(home / "file/sub"),
    }
    found = scratch_findings(settings, **given)
    assert (found["COLD"].mark, "not there yet" in found["COLD"].found) == ("warn", True)
    assert (found["EXTENDED"].mark, "AAL_SCRATCH_EXTENDED" in found["EXTENDED"].hint) == ("fail", True)


def test_a_place_with_less_room_than_a_call_may_take_is_a_warning(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.scratch.mkdir(parents=True)
    monkeypatch.setattr(doctor, "_free_mb", lambda _: 4095)
    marks = {tier: one.mark for tier, one in scratch_findings(settings).items()}
    assert marks == {"LOCAL": "ok", "EXTENDED": "ok", "COLD": "warn"}


def test_the_table_has_a_row_a_phase_and_a_column_a_right() -> None:
    allowed = Found(allowed=True, enforced=True, by=("seccomp",), found="")
    rows = list(doctor.rights_rows(findings(write=allowed, network=OPEN_WIDE)))
    assert list(doctor.RIGHTS_COLUMNS) == ["phase", *RIGHTS]
    assert rows == [("CLEAR", "no", "yes", "no, NOT HELD", "no", "no", "no", "no")]


def test_programs_get_the_same_as_json() -> None:
    told = json.loads(json.dumps(doctor.rights_json(findings())))
    assert told["CLEAR"]["read"] == {
        "allowed": False,
        "enforced": True,
        "by": ["landlock"],
        "found": "elsewhere refused (EACCES)",
    }
