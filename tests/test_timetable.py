"""When expressions come due: where clocks change, and over stretches of time that are long."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from pipelines.clock import iso
from pipelines.timetable import COUNTED, Timetable

BERLIN = ZoneInfo("Europe/Berlin")


def next_times(cron: str, zone: str, begin: str, num: int) -> list[str | None]:
    moment = datetime.fromisoformat(begin).replace(tzinfo=ZoneInfo(zone)).timestamp()
    return [iso(due) for due in islice(Timetable(cron, ZoneInfo(zone)).after(moment), num)]


def test_a_time_that_the_clock_skips_comes_due_right_after_the_gap() -> None:
    # On 29 March 2026 Berlin's clocks go from 02:00 to 03:00, which is 01:00 UTC.
    assert next_times("30 2 * * *", "Europe/Berlin", "2026-03-28 00:00", 3) == [
        "2026-03-28T01:30:00Z",
        "2026-03-29T01:00:00Z",
        "2026-03-30T00:30:00Z",
    ]


def test_a_time_that_the_clock_repeats_comes_due_once() -> None:
    # On 25 October 2026 they go from 03:00 to 02:00: 02:30 is 00:30 UTC and again 01:30 UTC.
    expected = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
    assert next_times("30 2 * * *", "Europe/Berlin", "2026-10-24 00:00", 3) == expected


def test_from_within_the_repeated_hour_nothing_comes_due_again() -> None:
    table = Timetable("30 2 * * *", BERLIN)
    second = datetime(2026, 10, 25, 2, 10, tzinfo=BERLIN, fold=1).timestamp()
    assert iso(table.next_after(second)) == "2026-10-26T01:30:00Z"


def test_every_hour_is_every_hour_that_passes() -> None:
    spring = next_times("0 * * * *", "Europe/Berlin", "2026-03-29 00:30", 3)
    assert spring == ["2026-03-29T00:00:00Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"]
    autumn = next_times("0 * * * *", "Europe/Berlin", "2026-10-25 01:30", 3)
    assert autumn == ["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"]


@pytest.mark.parametrize("cron", ["*/7 * * * *", "15 2,3 * * *", "0 0 29 2 *", "30 2 * * SUN#5"])
def test_going_on_from_any_due_time_gives_the_same_times(cron: str) -> None:
    """A schedule asks anew after each one, and must not depend on having counted in one go."""
    begin = datetime(2026, 3, 28, tzinfo=BERLIN).timestamp()
    table = Timetable(cron, BERLIN)
    at_once = list(islice(table.after(begin), 40))
    one_by_one, moment = [], begin
    for _ in range(40):
        due = table.next_after(moment)
        assert due is not None
        one_by_one.append(due)
        moment = due
    assert one_by_one == at_once


def test_a_window_counts_what_it_can_and_knows_its_ends() -> None:
    table, begin = Timetable("* * * * *", ZoneInfo("UTC")), datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")).timestamp()
    assert table.window(begin, begin + 59) is None
    few = table.window(begin, begin + 180)
    assert few is not None and (few.first, few.before_last, few.last) == (begin + 60, begin + 120, begin + 180)
    assert few.num == 3
    year = table.window(begin, begin + timedelta(days=365).total_seconds() + 30)
    assert year is not None and year.num is None and COUNTED == 1000
    assert (year.first, year.last) == (begin + 60, begin + timedelta(days=365).total_seconds())
    assert year.before_last == year.last - 60
