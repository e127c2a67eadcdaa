"""When a cron expression comes due, as moments that no change of the clocks can confuse.

A due time is a whole number of seconds since 1970. Expressions that name hour and minute follow the clock on the wall
as Debian's cron does: what the clock skips in spring comes due right after the gap, what it repeats in autumn once.
Those with a ``*`` first in the field of minutes or hours follow the time that passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim

COUNTED = 1000
"""Due times of a window that are counted one by one; where there are more, their number is not told."""


@dataclass(frozen=True, slots=True)
class Window:
    """The due times of a stretch of time. ``num`` is None where they are more than ``COUNTED``.

    ``before_last`` is the one before the last; None where there is one alone.
    """

    first: int
    last: int
    before_last: int | None
    num: int | None


@dataclass(frozen=True, slots=True)
class Timetable:
    """``cron``, five fields, on the clock of ``zone``."""

    cron: str
    zone: ZoneInfo

    def after(self, moment: float) -> Iterator[int]:
        """Every due time later than ``moment``, in order."""
        begin = datetime.fromtimestamp(moment, UTC).astimezone(self.zone)
        last = moment
        for due in CronSim(self.cron, begin):
            found = int(due.timestamp())
            # In a repeated hour the wall's time goes back, and the expression names what has been.
            if found > last:
                last = found
                yield found

    def next_after(self, moment: float) -> int | None:
        return next(self.after(moment), None)

    def window(self, after: float, until: float) -> Window | None:
        """The due times later than ``after`` and not later than ``until``."""
        found = list(islice(takewhile(lambda due: due <= until, self.after(after)), COUNTED + 1))
        if not found:
            return None
        num = len(found)
        if num > COUNTED:
            found = [found[0], *self._last_two(until)]
        return Window(
            first=found[0],
            last=found[-1],
            before_last=found[-2] if len(found) > 1 else None,
            num=num if num <= COUNTED else None,
        )

    def _last_two(self, until: float) -> list[int]:
        """The last two due times up to ``until``; there are two."""
        days = 1
        while True:
            begin = until - timedelta(days=days).total_seconds()
            found = list(takewhile(lambda due: due <= until, self.after(begin)))
            if len(found) >= 2:
                return found[-2:]
            days *= 2
