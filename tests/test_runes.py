from __future__ import annotations

import re
import sys
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bus import resources, runes
from bus.errors import InputError
from bus.runes import KvRule, MemoryProfile, RuneError, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from hypothesis.strategies import DrawFn

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


TIERS = ("'COLD'", "'EXTENDED'", "'LOCAL'")
CLAUSES = ("'DEGRADE'", "'KV'", "'MEM'", "'PRIORITY'", "'TIER'")
ACTIONS = ("'BATCH'", "'CONTEXT'", "'DISABLE'", "'OFFLOAD'", "'SHRINK_KV'")


@pytest.mark.parametrize(
    ("text", "line", "column", "found", "expected"),
    [
        (f"{MEM};\n\n  TIER=MOON", 3, 8, "'MOON'", TIERS),
        (f"{MEM};\r\n\r\n\tTIER=MOON\r\n", 3, 7, "'MOON'", TIERS),
        (f"\t{MEM}\t;\t\tTIER\t=\tMOON", 1, 39, "'MOON'", TIERS),
        (f"{MEM};\nTIER=LOCALLY", 2, 6, "'LOCALLY'", TIERS),
        (f"{MEM};\nTIER=LOCAL PRIORITY=3", 2, 12, "'PRIORITY'", ("';'", "the end of the text")),
        (f"{MEM};\nPRIORITY=3x\n", 2, 10, "'3x'", ("a number",)),
        (f"{MEM};\nPRIORITY=3.\n", 2, 10, "'3.'", ("a number",)),
        ("MEMORY[", 1, 1, "'MEMORY'", CLAUSES),
        ("\ufeff" + MEM, 1, 1, "'\\ufeff'", CLAUSES),
        (f"{MEM}\n;\n;\n", 3, 1, "';'", (*CLAUSES, "the end of the text")),
        ("MEM[\n  SOFT=1,\n  HARD=2\n\n", 3, 9, "the end of the text", ("','", "']'")),
        ("MEM[\n  SOFT=1,\n  HARD=2\n]", 4, 1, "']'", ("VOL=",)),
        ("MEM[\n  SOFT=4,\n  HARD=2,\n  VOL=LOW\n]", 3, 8, "'2'", ("a whole number from 4 to 1000000000",)),
        (f"{MEM};\nDEGRADE{{\n\tSTEP1:SHRINK(1)\n}}", 3, 8, "'SHRINK'", ACTIONS),
        (f"{MEM};\nDEGRADE{{\n\tSTEP1x:CONTEXT(1)\n}}", 3, 2, "'STEP1x'", ("STEP1, STEP2 ...",)),
        (f"{MEM};\nDEGRADE{{\n  STEP1:CONTEXT(1)\n  STEP2:CONTEXT(1)}}", 4, 3, "'STEP2'", ("','", "'}'")),
        (f"{MEM};\nDEGRADE{{\n  STEP1:DISABLE(a\tb)}}", 3, 19, "'b'", ("')'",)),
        (f"{MEM};\nDEGRADE{{\n  STEP1:DISABLE(1a)}}", 3, 17, "'1a'", ("a name",)),
        (f"{MEM};\n\n{MEM}", 3, 1, "'MEM'", ("MEM only once",)),
        (f"{MEM};\nKV[CAP=1,\r\nCAP=1]", 3, 1, "'CAP'", ("CAP only once",)),
        ("\n\n  PRIORITY=3\n\n", 3, 13, "the end of the text", ("a clause MEM[SOFT=..,HARD=..,VOL=..]",)),
    ],
)
def test_in_a_text_of_many_lines_place_finding_and_all_that_is_expected_are_exact(
    text: str, line: int, column: int, found: str, expected: tuple[str, ...]
) -> None:
    with pytest.raises(RuneError) as caught:
        runes.parse(text)
    error = caught.value
    assert (error.line, error.column, error.found, error.expected) == (line, column, found, expected)


@pytest.mark.parametrize(
    "rest",
    [
        "KV[CAP=1.00000000000000000000001,POLICY=LRU,PURGE=ON_EVENT]",
        "DEGRADE{STEP1:SHRINK_KV(1.00000000000000000000001)}",
        f"DEGRADE{{STEP1:SHRINK_KV(0.{'0' * 400}1)}}",
    ],
)
def test_a_figure_out_of_range_is_refused_also_where_a_float_of_it_would_be_in_range(rest: str) -> None:
    with pytest.raises(RuneError, match=r"expected a (number|fraction)"):
        runes.parse(f"{MEM};{rest}")


def test_numbers_are_refused_as_ever_where_python_reads_fewer_digits() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        for text in (f"MEM[SOFT={'9' * 700},HARD=2,VOL=LOW]", f"{MEM};DEGRADE{{STEP{'9' * 700}:CONTEXT(1)}}"):
            with pytest.raises(RuneError):
                runes.parse(text)
    finally:
        sys.set_int_max_str_digits(before)


def test_an_error_is_told_of_the_source_that_it_is_given() -> None:
    with pytest.raises(RuneError) as caught:
        runes.parse(f"{MEM};\nTIER=MOON")
    told = caught.value.within("profiles/FAST.rune", "Mend it.")
    assert told.detail.startswith("profiles/FAST.rune, line 2, column 6: found 'MOON', expected 'COLD' or ")
    assert (told.line, told.column, told.expected, told.hint) == (2, 6, TIERS, "Mend it.")


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
    st.builds(Step, st.just("SHRINK_KV"), st.floats(0, 1, exclude_min=True) | st.sampled_from([5e-324, 1e-17, 1.0])),
    st.builds(Step, st.just("CONTEXT"), st.integers(1, runes.MAX_TOKENS) | st.sampled_from([1, runes.MAX_TOKENS])),
    st.builds(Step, st.sampled_from(["DISABLE", "BATCH"]), NAMES),
    st.builds(Step, st.just("OFFLOAD"), st.sampled_from(["LOCAL", "EXTENDED", "COLD"])),
)
SIZES = st.integers(1, runes.MAX_MB) | st.sampled_from([1, runes.MAX_MB])
PROFILES = st.builds(
    lambda sizes, **others: MemoryProfile(min(sizes), max(sizes), **others),
    st.tuples(SIZES, SIZES),
    volatility=st.sampled_from(["LOW", "MED", "HIGH"]),
    kv=st.none()
    | st.builds(
        KvRule,
        st.floats(0, 1) | st.sampled_from([0.0, 5e-324, 1e-17, 1.0]),
        st.sampled_from(["LRU", "WINDOW", "TASK_BOUND"]),
        st.sampled_from(["ON_STRESS", "ON_EVENT", "ON_STRESS_OR_EVENT"]),
    ),
    tier=st.sampled_from(["LOCAL", "EXTENDED", "COLD"]),
    priority=st.integers(0, 9),
    steps=st.lists(STEPS, max_size=8).map(tuple),
)


@settings(max_examples=300)
@given(PROFILES)
def test_a_formatted_profile_reads_back_as_itself(profile: MemoryProfile) -> None:
    assert runes.parse(runes.format(profile)) == profile
    assert runes.parse(runes.layout(profile)) == profile


@settings(max_examples=300)
@given(PROFILES)
def test_the_layout_is_the_canonical_text_on_more_lines_and_stays_as_it_is(profile: MemoryProfile) -> None:
    laid_out = runes.layout(profile)
    assert re.sub(r"\s", "", laid_out) == runes.format(profile)
    assert runes.tidy(laid_out) == runes.tidy(runes.format(profile)) == laid_out


def test_the_layout_has_a_clause_a_line_and_a_step_a_line() -> None:
    assert runes.layout(runes.parse(SAMPLE)) == SAMPLE.lstrip()
    assert runes.tidy("PRIORITY=07 ; MEM[VOL=LOW,HARD=02,SOFT=1];DEGRADE{STEP4:SHRINK_KV(.50)};") == (
        "MEM[SOFT=1,HARD=2,VOL=LOW];\nTIER=LOCAL;\nPRIORITY=7;\nDEGRADE{\n  STEP1:SHRINK_KV(0.5)\n}\n"
    )


def test_the_shipped_files_have_the_layout() -> None:
    for file in resources.path("schemas/profiles").glob("*.rune"):
        assert runes.tidy(file.read_text("utf-8")) == file.read_text("utf-8")


def test_a_layout_that_could_not_be_read_again_is_refused() -> None:
    steps = ",".join(f"STEP{number}:SHRINK_KV(.5)" for number in range(1, 180))
    with pytest.raises(RuneError, match=r"characters once laid out, expected at most 4096"):
        runes.tidy(f"{MEM};DEGRADE{{{steps}}}")


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


def test_of_many_names_those_that_come_near_are_told() -> None:
    error = runes.unknown_name(" fast1 ", [f"P{number}" for number in range(100)] + ["Fast", "FAST"])
    assert (error.line, error.column, error.found) == (1, 2, "'fast1'")
    assert set(error.near) == {"Fast", "FAST"}
    assert set(error.expected[:2]) == {"Fast", "FAST"}
    assert "did you mean" in error.detail


# What is damaged is refused, or means what it says. `figures_of` reads a rune in a way of its own.


def figures_of(text: str) -> MemoryProfile:
    """What a sound rune says, read with `split` and `partition`. Fails where anything of the text would be ignored."""
    clauses = [part.strip() for part in text.split(";")]
    if not clauses[-1]:
        clauses.pop()
    found: dict[str, str] = {}
    for clause in clauses:
        keyword = re.match(r"[A-Z]+", clause)
        assert keyword, clause
        assert keyword[0] not in found, "a clause twice"
        found[keyword[0]] = clause[keyword.end() :].strip()
    memory = members_of(found.pop("MEM"))
    kv = members_of(found.pop("KV")) if "KV" in found else None
    profile = MemoryProfile(
        whole(memory.pop("SOFT")),
        whole(memory.pop("HARD")),
        memory.pop("VOL"),  # type: ignore[arg-type]  # any text, to be compared
        kv=kv and KvRule(share(kv.pop("CAP")), kv.pop("POLICY"), kv.pop("PURGE")),  # type: ignore[arg-type]
        tier=value_of(found.pop("TIER", "=LOCAL")),  # type: ignore[arg-type]
        priority=whole(value_of(found.pop("PRIORITY", "=5"))),
        steps=tuple(steps_of(found.pop("DEGRADE", "{}"))),
    )
    assert {**found, **memory, **(kv or {})} == {}, "what no profile has"
    return profile


def members_of(body: str) -> dict[str, str]:
    """The members of `[KEY=value,...]`, each once."""
    assert body[0] + body[-1] == "[]"
    pairs = [entry.partition("=") for entry in body[1:-1].split(",")]
    members = {key.strip(): value.strip() for key, _, value in pairs}
    assert len(members) == len(pairs), "a key twice"
    return members


def value_of(body: str) -> str:
    assert body[0] == "="
    return body[1:].strip()


def steps_of(body: str) -> Iterator[Step]:
    """The steps of `{STEPn:ACTION(value),...}`, whose numbers rise."""
    assert body[0] + body[-1] == "{}"
    numbers = [0]
    for entry in filter(None, body[1:-1].split(",")):
        label, _, action = (part.strip() for part in entry.partition(":"))
        name, _, rest = (part.strip() for part in action.partition("("))
        assert (label[:4], rest[-1]) == ("STEP", ")")
        numbers.append(whole(label[4:]))
        value = rest[:-1].strip()
        yield Step(name, {"SHRINK_KV": share, "CONTEXT": whole}.get(name, str)(value))  # type: ignore[arg-type]
    assert numbers == sorted(set(numbers))


def whole(text: str) -> int:
    assert re.fullmatch("[0-9]+", text)
    return int(text)


def share(text: str) -> float:
    assert re.fullmatch(r"[0-9]*\.?[0-9]+", text)
    assert 0 <= Decimal(text) <= 1
    return float(text)


TOKENS = [*";:,=[](){} \n\t\r0159.-_", "MEM", "SOFT", "HARD", "VOL", "LOW", "KV", "CAP", "LRU", "TIER", "COLD", "LOCAL"]
TOKENS += [
    "PRIORITY",
    "DEGRADE",
    "STEP1",
    "STEP2",
    "STEP9",
    "CONTEXT",
    "DISABLE",
    "BATCH",
    "00",
    "1e3",
    "0.5",
    "é",
    "\0",
]
TOKENS += [
    ";TIER=COLD",
    ";PRIORITY=1",
    "PRIORITY=9;",
    ",STEP9:CONTEXT(1)",
    ";KV[CAP=1,POLICY=LRU,PURGE=ON_EVENT]",
    "\u00a0",
]


@st.composite
def damaged(draw: DrawFn) -> str:
    """A sound rune in which one to three pieces were cut out, doubled, moved, put in, or written in other letters."""
    text = draw(st.sampled_from([SAMPLE, MEM]) | PROFILES.map(runes.format) | PROFILES.map(runes.layout))
    for _ in range(draw(st.integers(1, 3))):
        cuts = [0, len(text), *(found.start() for found in re.finditer(r"\b|[;,]", text))]
        places = st.sampled_from(cuts) | st.integers(0, len(text))
        start, end = sorted(draw(st.tuples(places, places)))
        before, piece, after = text[:start], text[start:end], text[end:]
        text = draw(
            st.sampled_from(
                [before + after, before + piece * 2 + after, before + after + piece, piece + before + after]
            )
            | st.sampled_from([before + piece.lower() + after, ";".join(reversed(text.split(";")))])
            | st.sampled_from(TOKENS).map(lambda token: before + token + piece + after)  # noqa: B023  # drawn at once
            | st.sampled_from(TOKENS).map(lambda token: before + token + text[start + 1 :])  # noqa: B023
        )
    return text


def parsed(text: str) -> MemoryProfile | RuneError:
    try:
        return runes.parse(text)
    except RuneError as error:
        return error


@settings(max_examples=1000)
@given(damaged())
def test_a_damaged_rune_is_refused_or_means_exactly_what_its_text_says(text: str) -> None:
    found = parsed(text)
    if isinstance(found, MemoryProfile):
        assert found == figures_of(text)
        return
    assert 1 <= found.line <= text.count("\n") + 1
    assert 1 <= found.column <= len(text.split("\n")[found.line - 1]) + 1
    assert found.expected


@settings(max_examples=200)
@given(PROFILES, st.randoms(use_true_random=False))
def test_order_and_white_space_change_nothing_of_what_a_text_says(profile: MemoryProfile, random: Random) -> None:
    clauses = runes.format(profile).split(";")
    random.shuffle(clauses)
    text = "\n;\t".join(re.sub(r"([=:,(){}\[\]])", r" \1\r\n", clause) for clause in clauses) + ";\n"
    assert runes.parse(text) == figures_of(text) == profile
