"""The simulator plays every call to its one end, exactly and the same each time; speed is never judged here."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import runes
from runners.base import Outcome
from tests.support import InProcessRunner, a_call, add_native, add_overlay, running_bus, settings_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "TOOLS" / "simulate_load.py"
LIMIT_S = 120
POLICIES = ("this bus", "this bus (new)", "no admission", "slots 4", "slots 32", "soft only", "the ancestor", "oracle")
ROOM_MB = 3072.0
SMALL = "MEM[SOFT=10,HARD=500,VOL=MED]"


@pytest.fixture(scope="module")
def part() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the simulation by its name."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "TOOLS"))
    yield lambda name: importlib.import_module(f"simulation.{name}")
    sys.path.remove(str(ROOT / "TOOLS"))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "simulation":
            del sys.modules[name]


@pytest.fixture(scope="module")
def crowded(part: Callable[[str], Any]) -> list[Any]:
    """Four minutes of calls that ask for one and a half times the memory that there is."""
    synthetic = part("synthetic")
    found: list[Any] = synthetic.make(synthetic.SCENARIOS["mixed"], 7, load=1.5, seconds=240, room_mb=ROOM_MB)
    return found


def a_world(
    part: Callable[[str], Any], calls: list[Any], policy: Any, total_mb: float = 4096, others_mb: float = 1024
) -> Any:
    make = part("command").POLICIES[policy] if isinstance(policy, str) else policy
    return part("world").World(calls, part("machine").Machine(total_mb, others_mb), make, seed=3)


def call_of(
    part: Callable[[str], Any], at_s: float = 0.0, peak_mb: float = 100.0, hold_s: float = 10.0, **more: Any
) -> Any:
    values = {"overlay": "o", "capability": "c", "rune": SMALL, "timeout_s": 100.0, "growth": "linear"} | more
    return part("calls").Call(at_s=at_s, hold_s=hold_s, peak_mb=peak_mb, **values)


# Traces


def test_a_seed_gives_the_same_trace_and_another_seed_another(part: Callable[[str], Any]) -> None:
    synthetic = part("synthetic")
    one, same, other = (
        synthetic.make(synthetic.SCENARIOS["mixed"], seed, load=0.5, seconds=60, room_mb=ROOM_MB) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("scenario", ["mixed", "ramp", "linear", "late"])
def test_a_trace_asks_for_about_the_load_that_it_was_made_for(part: Callable[[str], Any], scenario: str) -> None:
    synthetic, calls = part("synthetic"), part("calls")
    made = synthetic.make(synthetic.SCENARIOS[scenario], 1, load=0.5, seconds=20_000, room_mb=ROOM_MB)
    demand = sum(calls.area_mb_s(call.curve()) for call in made) / 20_000 / ROOM_MB
    assert 0.4 < demand < 0.6
    assert [call.at_s for call in made] == sorted(call.at_s for call in made)


def test_scripts_of_nine_mb_declare_two_thousand(part: Callable[[str], Any], crowded: list[Any]) -> None:
    scripts = [call for call in crowded if call.overlay == "script"]
    assert len(scripts) > len(crowded) / 5
    assert all(call.peak_mb <= 12 and (call.profile.soft_mb, call.profile.hard_mb) == (2048, 4096) for call in scripts)


def test_calls_of_one_capability_grow_alike_and_have_one_priority(crowded: list[Any]) -> None:
    seen: dict[str, set[tuple[str, int]]] = {}
    for call in crowded:
        seen.setdefault(call.key, set()).add((call.growth, call.profile.priority))
    assert all(len(kinds) == 1 for kinds in seen.values())
    assert {priority for kinds in seen.values() for _, priority in kinds} == {2, 5, 8}


@pytest.mark.parametrize("growth", ["ramp", "linear", "late"])
@pytest.mark.parametrize("peak_mb", [2.0, 20.0, 400.0])
def test_memory_grows_to_the_peak_and_never_shrinks(part: Callable[[str], Any], growth: str, peak_mb: float) -> None:
    curve = call_of(part, growth=growth, peak_mb=peak_mb, hold_s=20.0).curve()
    assert [point.mb for point in curve] == sorted(point.mb for point in curve)
    assert [point.age_s for point in curve] == sorted({point.age_s for point in curve})
    assert (curve[0].age_s, curve[-1]) == (0.0, (20.0, peak_mb))


def test_a_cache_that_is_told_to_shrink_takes_less(part: Callable[[str], Any]) -> None:
    assert call_of(part, kv_share=0.5).curve(0.5)[-1].mb == 75.0


def test_a_trace_is_read_as_it_was_written(part: Callable[[str], Any], crowded: list[Any], tmp_path: Path) -> None:
    part("calls").write(crowded, tmp_path / "trace.jsonl")
    assert part("calls").read(tmp_path / "trace.jsonl") == crowded


@pytest.mark.parametrize(
    "change", [{"hold_s": 0}, {"peak_mb": "9"}, {"growth": "sudden"}, {"rune": "MEM[]"}, {"extra": 1}, {"kv_share": 2}]
)
def test_a_line_that_is_no_call_is_named(part: Callable[[str], Any], tmp_path: Path, change: dict[str, Any]) -> None:
    calls = part("calls")
    calls.write([call_of(part)], tmp_path / "trace.jsonl")
    text = (tmp_path / "trace.jsonl").read_text()
    (tmp_path / "trace.jsonl").write_text(text + json.dumps(json.loads(text) | change))
    with pytest.raises(calls.TraceError, match=r"line 2 is not a call of a trace: "):
        calls.read(tmp_path / "trace.jsonl")


async def test_a_ledger_gives_the_calls_that_were_measured(part: Callable[[str], Any], tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    add_overlay(settings.overlays, "echo")
    add_native(
        settings.overlays, "native", {"run": {"runner": "proc", "memory": "BALANCED"}}, policy={"deterministic": True}
    )
    runner = InProcessRunner(lambda job: Outcome(result={}, peak_mb=33.0 if job.overlay == "echo" else None))
    rune = "MEM[SOFT=64,HARD=128,VOL=LOW];PRIORITY=8"
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("native"))
        await bus.invoke(a_call("echo", timeout_ms=5000))
        await bus.invoke(a_call("echo", profile=rune))
        await bus.invoke(a_call("nobody"))
    found = part("recorded").read(settings.ledger)
    assert found.left_out == 2  # the one of which nothing was measured, and the one that was refused
    first, second = found.calls
    assert (first.at_s, first.key, first.peak_mb, first.timeout_s) == (0.0, "echo.run", 33.0, 5.0)
    assert (first.profile, second.profile) == (runes.resolve("MINIMAL"), runes.resolve(rune))
    assert all(0 < call.hold_s < 5 for call in found.calls)
    assert a_world(part, found.calls, "this bus (new)").run().figures()["finished"] == 2


# The world


@pytest.mark.parametrize("policy", POLICIES)
def test_every_call_ends_once_and_memory_is_empty_then(
    part: Callable[[str], Any], crowded: list[Any], policy: str
) -> None:
    world = a_world(part, crowded, policy)
    tally = world.run()
    assert len(tally.waits) + tally.losses.total() == len(crowded)
    assert (len(world.running), world.machine.calls_mb(world.now)) == (0, 0.0)
    assert min(wait.wait_s for wait in tally.waits) >= 0
    assert 0 < tally.figures()["used"] <= tally.figures()["peak_used"] <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_simulation_is_the_same_each_time(part: Callable[[str], Any], crowded: list[Any], policy: str) -> None:
    first, second = (a_world(part, crowded, policy).run() for _ in range(2))
    assert first.figures() == second.figures()
    assert first.waits == second.waits


@pytest.mark.parametrize("policy", ["this bus (new)", "no admission"])
def test_the_sum_of_memory_is_that_of_what_runs(part: Callable[[str], Any], crowded: list[Any], policy: str) -> None:
    class Adding(part("command").POLICIES[policy]):  # type: ignore[misc]  # a class that is found at run time
        sums = 0

        def sampled(self) -> None:
            super().sampled()
            added = sum(request.mb(self.world.now) for request in self.world.running)
            assert self.world.machine.calls_mb(self.world.now) == pytest.approx(added)
            assert added <= ROOM_MB + 1e-3
            self.sums += bool(added)

    world = a_world(part, crowded, Adding)
    world.run()
    assert world.policy.sums > 10


def test_the_largest_is_killed_at_the_moment_when_memory_is_full(part: Callable[[str], Any]) -> None:
    """From 8 MiB each, one grows by 10 and one by 20 MiB a second: 100 MiB are full after 2.8 s."""
    killed: list[tuple[float, float, str]] = []

    class Watching(part("policies").Nobody):  # type: ignore[misc]
        def ended(self, request: Any, code: str) -> None:
            killed.append((self.world.now, request.call.peak_mb, str(code)))

    calls = [call_of(part, peak_mb=108.0), call_of(part, peak_mb=208.0)]
    world = a_world(part, calls, Watching, total_mb=100, others_mb=0)
    world.run()
    assert killed[0][0] == pytest.approx(2.8)
    assert killed[0][1:] == (208.0, "ERR_OVERLAY_CRASH")
    assert killed[0][0] < killed[1][0]


def test_a_call_that_is_larger_than_the_machine_is_lost_when_its_client_gives_up(part: Callable[[str], Any]) -> None:
    world = a_world(part, [call_of(part, peak_mb=500.0)], "no admission", total_mb=400, others_mb=0)
    tally = world.run()
    assert (dict(tally.losses), tally.kills) == ({"gave up": 1}, part("world").MOST_TRIES)
    assert tally.figures()["work_lost"] == pytest.approx(1)


def test_a_call_is_lost_at_its_deadline_wherever_it_is(part: Callable[[str], Any]) -> None:
    running, waiting = call_of(part, timeout_s=5.0), call_of(part, at_s=1.0, timeout_s=2.0)
    tally = a_world(part, [running, waiting], lambda world: part("policies").Slots(world, 1)).run()
    assert (dict(tally.losses), tally.makespan_s, tally.started) == ({"deadline": 2}, 5.0, 1)


# Policies


def test_without_admission_everything_starts_when_it_is_asked_for(
    part: Callable[[str], Any], crowded: list[Any]
) -> None:
    asked: list[float] = []

    class Watching(part("policies").Nobody):  # type: ignore[misc]
        def ask(self, request: Any) -> None:
            super().ask(request)
            asked.append(request.started_s - request.asked_s)

    tally = a_world(part, crowded, Watching).run()
    assert set(asked) == {0.0}
    assert (tally.refusals, tally.started) == (0, len(asked))
    assert tally.kills > 0


def test_an_oracle_has_no_call_killed(part: Callable[[str], Any], crowded: list[Any]) -> None:
    tally = a_world(part, crowded, "oracle").run()
    assert (tally.kills, tally.evictions, tally.refusals) == (0, 0, 0)
    assert tally.figures()["peak_used"] > 0.95


def test_an_oracle_lets_pass_what_does_not_delay_the_first(part: Callable[[str], Any]) -> None:
    """Of 100 MiB one call has 80 until 10 s. The next needs 50. A short one passes it, and a long one does not."""
    calls = [
        call_of(part, 0.0, 80.0, 10.0, growth="ramp"),
        call_of(part, 1.0, 50.0, 10.0, growth="ramp"),
        call_of(part, 2.0, 19.0, 5.0, growth="ramp"),
        call_of(part, 3.0, 60.0, 30.0, growth="ramp"),
        call_of(part, 8.0, 19.0, 1.0, growth="ramp"),
    ]
    tally = a_world(part, calls, "oracle", total_mb=100, others_mb=0).run()
    assert [wait.wait_s for wait in tally.waits] == [0.0, 0.0, 0.0, pytest.approx(9.0), pytest.approx(17.0)]


@pytest.mark.parametrize("slots", [1, 5])
def test_slots_are_never_exceeded(part: Callable[[str], Any], crowded: list[Any], slots: int) -> None:
    most: list[int] = []

    class Watching(part("policies").Slots):  # type: ignore[misc]
        def sampled(self) -> None:
            most.append(len(self.world.running))

    a_world(part, crowded, lambda world: Watching(world, slots)).run()
    assert max(most) == slots


def test_soft_only_reserves_what_is_declared_and_no_more_than_there_is(
    part: Callable[[str], Any], crowded: list[Any]
) -> None:
    reserved: list[float] = []

    class Watching(part("policies").SoftOnly):  # type: ignore[misc]
        def sampled(self) -> None:
            declared = sum(request.call.profile.soft_mb for request in self.world.running)
            assert self.reserved_mb() == declared
            reserved.append(declared)

    a_world(part, crowded, Watching).run()
    assert ROOM_MB / 2 < max(reserved) <= ROOM_MB


@pytest.mark.parametrize(("others_mb", "peak_mb"), [(100.0, 200.0), (750.0, 142.19)])
def test_the_ancestor_applies_all_steps_above_the_threshold_and_none_below(
    part: Callable[[str], Any], others_mb: float, peak_mb: float
) -> None:
    """A share of 0.75 is a stress of 0.6: above the 0.55 of priority 5."""
    steps = "DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:SHRINK_KV(0.75),STEP3:SHRINK_KV(0.75)}"
    call = call_of(part, peak_mb=200.0, kv_share=0.5, rune=f"{SMALL};{steps}")
    tally = a_world(part, [call], "the ancestor", total_mb=1000, others_mb=others_mb).run()
    assert tally.peak_mb == pytest.approx(peak_mb, abs=0.01)


def test_this_bus_learns_what_its_calls_need(part: Callable[[str], Any]) -> None:
    rune = "MEM[SOFT=2048,HARD=4096,VOL=MED]"
    calls = [call_of(part, float(n), 9.0, 0.5, rune=rune) for n in range(25)]
    world = a_world(part, calls, "this bus (new)")
    world.run()
    need = world.policy.needs.of("o.c", calls[0].profile)
    assert (need.basis, need.mb) == ("measured", pytest.approx(9 * 1.25))


def test_this_bus_that_has_learned_knows_what_its_calls_need_before_the_first(part: Callable[[str], Any]) -> None:
    """It would be seen to have grown by the same time if it ran alone."""
    calls = [call_of(part, 20.0 * n, 90.0 + n, 8.0, growth="late") for n in range(25)]
    learned, new = a_world(part, calls, "this bus"), a_world(part, calls, "this bus (new)")
    before = learned.policy.needs.of("o.c", calls[0].profile)
    new.run()
    assert before.basis == "measured"
    after = new.policy.needs.of("o.c", calls[0].profile)
    assert before._replace(settled_after_s=0.0) == after._replace(settled_after_s=0.0)
    assert before.settled_after_s == pytest.approx(after.settled_after_s)


def test_this_bus_ends_what_has_more_than_its_hard(part: Callable[[str], Any]) -> None:
    tally = a_world(part, [call_of(part, peak_mb=600.0)], "this bus (new)").run()
    assert (dict(tally.losses), tally.kills) == ({"over HARD": 1}, 0)
    assert 500 < tally.peak_mb < 520


def test_this_bus_refuses_low_priorities_under_critical_stress_and_evicts_what_runs(part: Callable[[str], Any]) -> None:
    """Others have 970 of 1000 MiB."""
    low = call_of(part, peak_mb=9.0, hold_s=30.0, rune=f"{SMALL};PRIORITY=3", overlay="low")
    high = call_of(part, peak_mb=9.0, hold_s=30.0, rune=f"{SMALL};PRIORITY=5", overlay="high", repeatable=True)
    tally = a_world(part, [low, high], "this bus (new)", total_mb=1000, others_mb=970).run()
    assert (tally.refusals, tally.evictions, tally.kills) == (part("world").MOST_TRIES, 1, 0)
    assert dict(tally.losses) == {"gave up": 1, "deadline": 1}


def test_looks_that_would_see_nothing_new_may_be_left_out(part: Callable[[str], Any], crowded: list[Any]) -> None:
    class Looking(part("this_bus").LearnedBus):  # type: ignore[misc]
        def _next_look_s(self, request: Any, seen: Any) -> float:
            return float(seen.due)

    few, all_ = (a_world(part, crowded, policy).run() for policy in ("this bus", Looking))
    assert few.waits == all_.waits
    assert few.figures() == pytest.approx(all_.figures())


# The command


def tool(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(TOOL), "--minutes", "2", "--seeds", "1", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == status, done.stderr
    return done


def test_the_command_gives_its_figures_as_json_with_their_spread_over_the_seeds() -> None:
    report = json.loads(tool("--json", "-", "--seeds", "2", "--scenario", "ramp,late").stdout)
    assert [sheet["scenario"] for sheet in report["sheets"]] == ["ramp", "late"]
    for sheet in report["sheets"]:
        assert {row["policy"] for row in sheet["rows"]} >= set(POLICIES)
        assert sum(row["best"] for row in sheet["rows"]) == 1
        finished = [row["figures"]["finished"] for row in sheet["rows"]]
        assert all(figure["least"] <= figure["median"] <= figure["most"] for figure in finished)


def test_a_trace_that_was_saved_is_played_as_the_one_of_the_seed(tmp_path: Path) -> None:
    saved = str(tmp_path / "trace.jsonl")
    tool("--save", saved)
    played, made = (
        json.loads(tool("--only", "slots 8", "--json", "-", *given).stdout)["sheets"][0]["rows"][0]["figures"]
        for given in (["--trace", saved], [])
    )
    assert played == made


def test_the_tables_are_for_people_or_for_a_readme() -> None:
    assert "no admission" in tool("--only", "no admission").stdout
    assert "\n| no admission | " in tool("--only", "no admission", "--markdown").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "magic"], "magic unknown, allowed: this bus,"),
        (["--trace", "no/such/file"], "No such file"),
        (["--ledger", "no/such/file"], "No such file"),
        (["--load", "0"], "allowed: above 0"),
        (["--others-mb", "9000"], "leaves nothing of --memory-mb 4096"),
        (["--load", "0.0000001"], "take more time or a larger load"),
    ],
)
def test_what_cannot_be_simulated_is_said(arguments: list[str], said: str) -> None:
    assert said in tool(*arguments, status=2).stderr


def test_the_readme_has_a_row_for_each_policy_and_the_command_that_made_it(part: Callable[[str], Any]) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"<!-- simulation -->\n(.*)<!-- /simulation -->", text, re.DOTALL)
    assert found
    assert "| " + " | ".join(part("report").HEADER) + " |" in found[1]
    assert all(
        re.search(rf"^\| {re.escape(policy)}[ |(]", found[1], re.MULTILINE) for policy in part("command").POLICIES
    )
    assert "TOOLS/simulate_load.py" in found[1]


def test_the_cost_of_decisions_is_told_for_each_situation() -> None:
    argv = [sys.executable, str(ROOT / "TOOLS" / "bench" / "decisions.py"), "--calls", "3", "--json"]
    report = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout)
    situations = {(found["blocked"], found["capabilities"]) for found in report["found"]}
    assert situations >= {("memory", 1), ("memory", 50), ("memory", 1000), ("slot", 1000), ("concurrency", 50)}
    assert all(0 < found["p50_us"] <= found["p99_us"] for found in report["found"])
