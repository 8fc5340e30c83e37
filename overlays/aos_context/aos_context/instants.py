"""When a timestamp was, so that two can be compared that are written in different ways."""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache

_RFC_3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
_CYCLE_YEARS = 400
_CYCLE_DAYS = 146_097


@lru_cache(maxsize=1 << 14)
def instant(timestamp: str) -> tuple[int, str]:
    """Seconds on the proleptic Gregorian calendar, and the digits of their fraction, to sort by.

    Takes all that the schemas' `date-time` does (RFC 3339, section 5.6), of which `datetime.fromisoformat` refuses
    some: a leap second, the year 0, a small `t` or `z`; and it cuts a fraction after six digits. Raises `ValueError`.
    """
    match = _RFC_3339.fullmatch(timestamp)
    if match is None:
        raise ValueError(f"{timestamp!r} is no date-time of RFC 3339")
    year, month, day, hour, minute, second = (int(part) for part in match.group(1, 2, 3, 4, 5, 6))
    # The calendar repeats after 400 years, so any year has its like from 2000 on.
    days = date(2000 + year % _CYCLE_YEARS, month, day).toordinal() + year // _CYCLE_YEARS * _CYCLE_DAYS
    offset = 0 if match[8] is None else int(f"{match[8]}1") * (int(match[9]) * 60 + int(match[10]))
    return ((days * 24 + hour) * 60 + minute - offset) * 60 + second, (match[7] or "").rstrip("0")
