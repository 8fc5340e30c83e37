"""Timestamps by the instant that they say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from aos_context.artifacts import schema
from aos_context.instants import instant
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator

OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=OFFSETS)  # noqa: DTZ001
DATE_TIME = Draft202012Validator({"type": "string", "format": "date-time"}, validate_formats=True)

IN_ORDER = [
    "0000-02-29T00:00:00Z", "0001-01-01T00:00:00+05:00", "0001-01-01T00:00:00Z", "2016-12-31T23:59:59.9Z",
    "2016-12-31T23:59:60Z", "2026-01-18T00:00:00.05+00:30", "2026-01-17T23:30:00.1Z", "2026-01-18t00:00:00z",
    "2026-01-18T00:00:00.0000001Z", "2026-01-18T00:00:00.00000011Z", "2026-01-18T01:00:00+00:59",
]  # fmt: skip


def test_instants_are_in_order_whatever_the_offset_and_the_fraction() -> None:
    instants = [instant(one) for one in IN_ORDER]
    assert instants == sorted(set(instants))


@given(MOMENTS, MOMENTS)
def test_instants_compare_as_the_moments_do(one: datetime, other: datetime) -> None:
    assert (instant(one.isoformat()) < instant(other.isoformat())) == (one < other)
    assert (instant(one.isoformat()) == instant(other.isoformat())) == (one == other)


@given(MOMENTS)
def test_a_moment_is_one_value_whichever_its_offset_is(moment: datetime) -> None:
    utc = moment.astimezone(UTC).isoformat()
    assert instant(moment.isoformat()) == instant(utc) == instant(utc.replace("+00:00", "z").replace("T", "t"))


@given(st.from_regex(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9](\.[0-9]{1,12})?(Z|[+-][01][0-9]:[0-5][0-9])", fullmatch=True))  # fmt: skip # noqa: E501
def test_every_timestamp_that_the_schemas_allow_is_an_instant(timestamp: str) -> None:
    if DATE_TIME.is_valid(timestamp):
        seconds, fraction = instant(timestamp)
        assert seconds > 0
        assert fraction == timestamp.partition(".")[2].partition("+")[0].partition("-")[0].rstrip("Z").rstrip("0")


def test_the_schemas_check_what_a_timestamp_is() -> None:
    assert schema("working_set")["$defs"]["item"]["properties"]["timestamp"]["format"] == "date-time"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("0000-12-31T23:59:59Z", "0001-01-01T00:00:00Z"),
        ("1999-12-31T23:59:59Z", "2000-01-01T00:00:00Z"),
        ("2026-01-18T00:00:00.000000001Z", "2026-01-18T00:00:00.000000002Z"),
        ("2026-01-18T00:00:00.09Z", "2026-01-18T00:00:00.1Z"),
        ("2016-12-31T23:59:59.9Z", "2016-12-31T23:59:60Z"),
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59-00:01"),
    ],
)
def test_the_edges_of_the_calendar_and_of_a_second_are_in_order(earlier: str, later: str) -> None:
    assert instant(earlier) < instant(later)


def test_zeros_at_the_end_of_a_fraction_make_no_other_instant() -> None:
    assert instant("2026-01-18T00:00:00.500Z") == instant("2026-01-18T00:00:00.5Z")
    assert instant("2026-01-18T00:00:00.000Z") == instant("2026-01-18T00:00:00Z")


def test_a_timestamp_without_an_offset_is_no_instant() -> None:
    with pytest.raises(ValueError, match="2026-01-18T00:00:00"):
        instant("2026-01-18T00:00:00")
