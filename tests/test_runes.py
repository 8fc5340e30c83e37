from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bus import runes
from bus.errors import InputError
from bus.runes import KvRule, MemoryProfile, RuneError, Step

SAMPLE = """
MEM[SOFT=2048,HARD=4096,VOL=MED];
KV[CAP=0.2,POLICY=WINDOW,PURGE=ON_STRESS];
TIER=EXTENDED;
PRIORITY=7;
DEGRADE{
  STEP1:SHRINK_KV(0.75),
  STEP2:CONTEXT(4096),
  STEP3:DISABLE(HIGH_COST_METRICS),
  STEP4:BATCH(ASYNC),
  STEP5:OFFLOAD(EXTENDED)
}
"""
MEM = "MEM[SOFT=1,HARD=2,VOL=LOW]"


def test_a_whole_rune_becomes_a_profile() -> None:
    assert runes.parse(SAMPLE) == MemoryProfile(
        soft_mb=2048,
        hard_mb=4096,
        volatility="MED",
        kv=KvRule(0.2, "WINDOW", "ON_STRESS"),
        tier="EXTENDED",
        priority=7,
        steps=(
            Step("SHRINK_KV", 0.75),
            Step("CONTEXT", 4096),
            Step("DISABLE", "HIGH_COST_METRICS"),
            Step("BATCH", "ASYNC"),
            Step("OFFLOAD", "EXTENDED"),
        ),
    )


def test_only_mem_is_required_and_the_rest_has_defaults() -> None:
    assert runes.parse(MEM) == MemoryProfile(1, 2, "LOW", kv=None, tier="LOCAL", priority=5, steps=())


@pytest.mark.parametrize(
    "text",
    [
        "PRIORITY=5;TIER=LOCAL;MEM[SOFT=1,HARD=2,VOL=LOW]",
        "MEM[VOL=LOW,HARD=2,SOFT=1]",
        " MEM [\n SOFT = 1 ,\tHARD = 2 , VOL = LOW ]\r\n ; ",
        "MEM[SOFT=1,HARD=2,VOL=LOW];",
        "MEM[SOFT=01,HARD=002,VOL=LOW]",
    ],
)
def test_order_white_space_and_a_last_semicolon_are_free(text: str) -> None:
    assert runes.parse(text) == runes.parse(MEM)


@pytest.mark.parametrize(
    ("text", "column", "found", "expected"),
    [
        ("", 1, "the end of the text", "'MEM'"),
        ("   ", 1, "the end of the text", "'MEM'"),
        ("PRIORITY=3", 11, "the end of the text", "a clause MEM[SOFT=..,HARD=..,VOL=..]"),
        ("MEM[SOFT=many", 10, "'many'", "a number"),
        ("MEM[SOFT=-1,HARD=2,VOL=LOW]", 10, "'-1'", "a number"),
        ("MEM[SOFT=0,HARD=2,VOL=LOW]", 10, "'0'", "a whole number from 1 to 1000000000"),
        ("MEM[SOFT=1.5,HARD=2,VOL=LOW]", 10, "'1.5'", "a whole number from 1 to 1000000000"),
        ("MEM[SOFT=4,HARD=2,VOL=LOW]", 17, "'2'", "a whole number from 4 to 1000000000"),
        ("MEM[SOFT=1,HARD=9999999999,VOL=LOW]", 17, "'9999999999'", "a whole number from 1 to 1000000000"),
        ("MEM[SOFT=1,HARD=2,VOL=SOME]", 23, "'SOME'", "'MED'"),
        ("MEM[SOFT=1,HARD=2]", 18, "']'", "VOL="),
        ("MEM[SOFT=1,SOFT=1,HARD=2,VOL=LOW]", 12, "'SOFT'", "SOFT only once"),
        (f"{MEM};{MEM}", 28, "'MEM'", "MEM only once"),
        (f"{MEM};TIER=LOCAL;TIER=COLD", 39, "'TIER'", "TIER only once"),
        (f"{MEM};;", 28, "';'", "the end of the text"),
        (f";{MEM}", 1, "';'", "'MEM'"),
        (f"{MEM} and more", 28, "'and'", "';'"),
        (f"{MEM} TIER=LOCAL", 28, "'TIER'", "';'"),
        (f"{MEM};TIER=MOON", 33, "'MOON'", "'COLD'"),
        (f"{MEM};PRIORITY=10", 37, "'10'", "a whole number from 0 to 9"),
        (f"{MEM};KV[CAP=1.01,POLICY=LRU,PURGE=ON_STRESS]", 35, "'1.01'", "a number from 0 to 1"),
        (f"{MEM};KV[CAP=1,POLICY=FIFO,PURGE=ON_STRESS]", 44, "'FIFO'", "'TASK_BOUND'"),
        (f"{MEM};KV[CAP=1,POLICY=LRU]", 47, "']'", "PURGE="),
        (f"{MEM};DEGRADE{{}}", 36, "'}'", "STEP1, STEP2 ..."),
        (f"{MEM};DEGRADE{{STEP1:SHRINK(0.5)}}", 42, "'SHRINK'", "'SHRINK_KV'"),
        (f"{MEM};DEGRADE{{STEP1:SHRINK_KV(0)}}", 52, "'0'", "a fraction above 0, up to 1"),
        (f"{MEM};DEGRADE{{STEP1:SHRINK_KV(1.5)}}", 52, "'1.5'", "a fraction above 0, up to 1"),
        (f"{MEM};DEGRADE{{STEP1:CONTEXT(0)}}", 50, "'0'", "a whole number from 1 to 1000000000000"),
        (f"{MEM};DEGRADE{{STEP1:OFFLOAD(MOON)}}", 50, "'MOON'", "'EXTENDED'"),
        (f"{MEM};DEGRADE{{STEP0:CONTEXT(1)}}", 36, "'STEP0'", "STEP1 or a later one"),
        (f"{MEM};DEGRADE{{STEP2:CONTEXT(1),STEP2:CONTEXT(2)}}", 53, "'STEP2'", "STEP3 or a later one"),
        (f"{MEM};DEGRADE{{STEP2:CONTEXT(1),STEP1:CONTEXT(2)}}", 53, "'STEP1'", "STEP3 or a later one"),
        (f"{MEM};DEGRADE{{STEP1:CONTEXT(1),}}", 53, "'}'", "STEP1, STEP2 ..."),
        ("mem[soft=1,hard=2,vol=low]", 1, "'mem'", "'MEM'"),
        ("\0", 1, "'\\x00'", "'MEM'"),
        ("\ud800", 1, "'\\ud800'", "'MEM'"),
    ],
)
def test_a_fault_is_named_with_its_place_what_stands_there_and_what_may(
    text: str, column: int, found: str, expected: str
) -> None:
    with pytest.raises(RuneError) as caught:
        runes.parse(text)
    error = caught.value
    assert (error.line, error.column, error.found) == (1, column, found)
    assert expected in error.expected
    assert f"line 1, column {column}: found {found}, expected " in error.detail
    assert expected in error.detail


def test_a_fault_on_a_later_line_is_counted_from_there() -> None:
    with pytest.raises(RuneError) as caught:
        runes.parse(f"{MEM};\n\n  TIER=MOON")
    assert (caught.value.line, caught.value.column) == (3, 8)


def test_the_error_is_an_input_error_with_the_catalogues_code() -> None:
    with pytest.raises(InputError) as caught:
        runes.parse("?")
    assert caught.value.code == "ERR_BAD_RUNE"
    assert caught.value.entry.http_status == 422


def test_a_long_text_is_refused_before_it_is_read() -> None:
    with pytest.raises(RuneError, match=r"found 1000000 characters, expected at most 4096"):
        runes.parse("(" * 1_000_000)


def test_a_text_of_the_greatest_length_is_read() -> None:
    assert runes.parse(MEM + " " * (runes.MAX_CHARS - len(MEM))) == runes.parse(MEM)


PIECES = [
    "MEM[",
    "SOFT=1,HARD=2,VOL=LOW]",
    ";",
    "KV[CAP=",
    "TIER=",
    "DEGRADE{",
    "STEP1:",
    "CONTEXT(",
    "9" * 4000,
    ")",
    "}",
]


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*PIECES, "\0", "😀", "."])).map("".join)))
@example(f"MEM[SOFT={'9' * 4000}]")
@example(f"{MEM};DEGRADE{{STEP{'9' * 4000}:CONTEXT(1)}}")
@example("😀" * 1000)
def test_no_text_raises_anything_but_a_rune_error(text: str) -> None:
    try:
        profile = runes.parse(text)
    except RuneError:
        return
    assert profile.hard_mb >= profile.soft_mb > 0


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
STEPS = st.one_of(
    st.builds(Step, st.just("SHRINK_KV"), st.floats(0, 1, exclude_min=True)),
    st.builds(Step, st.just("CONTEXT"), st.integers(1, runes.MAX_TOKENS)),
    st.builds(Step, st.sampled_from(["DISABLE", "BATCH"]), NAMES),
    st.builds(Step, st.just("OFFLOAD"), st.sampled_from(["LOCAL", "EXTENDED", "COLD"])),
)
PROFILES = st.builds(
    lambda soft_mb, more_mb, **others: MemoryProfile(soft_mb, soft_mb + more_mb, **others),
    st.integers(1, runes.MAX_MB // 2),
    st.integers(0, runes.MAX_MB // 2),
    volatility=st.sampled_from(["LOW", "MED", "HIGH"]),
    kv=st.none()
    | st.builds(
        KvRule,
        st.floats(0, 1),
        st.sampled_from(["LRU", "WINDOW", "TASK_BOUND"]),
        st.sampled_from(["ON_STRESS", "ON_EVENT", "ON_STRESS_OR_EVENT"]),
    ),
    tier=st.sampled_from(["LOCAL", "EXTENDED", "COLD"]),
    priority=st.integers(0, 9),
    steps=st.lists(STEPS, max_size=6).map(tuple),
)


@settings(deadline=None)
@given(PROFILES)
def test_a_formatted_profile_reads_back_as_itself(profile: MemoryProfile) -> None:
    assert runes.parse(runes.format(profile)) == profile


def test_a_formatted_profile_is_written_in_the_languages_own_order() -> None:
    assert runes.format(runes.parse(SAMPLE)) == "".join(SAMPLE.split())


def test_the_shipped_profiles_are_the_three_that_callers_know() -> None:
    known = {
        name: (p.soft_mb, p.hard_mb, p.priority, p.tier, bool(p.kv), bool(p.steps))
        for name, p in runes.profiles().items()
    }
    assert known == {
        "MINIMAL": (512, 1024, 3, "LOCAL", False, False),
        "BALANCED": (2048, 4096, 5, "EXTENDED", True, True),
        "PERFORMANCE": (4096, 8192, 8, "LOCAL", True, True),
    }


def test_a_profile_is_resolved_by_name() -> None:
    assert runes.resolve(" MINIMAL ").name == "MINIMAL"


def test_a_profile_is_resolved_from_rune_text() -> None:
    assert runes.resolve(SAMPLE) == replace(runes.parse(SAMPLE), name=None)


def test_an_unknown_name_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(RuneError, match=r"found 'MINIMUM', expected BALANCED or MINIMAL or PERFORMANCE or a rune"):
        runes.resolve("MINIMUM")
