"""Where nothing fits: what is in the way, and what would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distill.config import RunConfig
from distill.hardware import Device, Pool
from pipelines.fitting import CHANGES, Search, changed, search
from pipelines.layouts import Change, Devices, Pair

_APART = (
    "; servers that teacher.urls names are planned for too: their GPUs are named apart, with --gpus-teacher and "
    "--gpus-student (launch.gpus_teacher and launch.gpus_student in a job file)"
)

MOST_FACTOR = 256
"""Times as many devices that are tried to find what would fit."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What would do, where nothing fits ``devices``."""

    config: RunConfig
    pair: Pair
    devices: Devices
    processes: int | None

    def sentence(self, known: Mapping[str, Device], found: Search) -> str:
        """What nothing fits, what it lacks, and what would do."""
        ways = [way for way in (self._more(), self._larger(known)) if way is not None]
        if ways:
            would = f"what would: {', or '.join(ways)}"
        else:
            most = self.devices.times(MOST_FACTOR)
            found, would = search(self.config, self.pair, most, processes=self.processes), f"neither would {most}"
        fixed = "" if self.processes is None else f" with {self.processes} processes of the student"
        if self.devices.roles_at_once > 1:
            fixed += " with the servers of both roles of the teacher up at once, each on GPUs of its own"
        urls = self.config.teacher.urls
        apart = "" if not self.devices.is_one or not (urls.generate or urls.score) else _APART
        return f"nothing fits {self.devices}{fixed}: {found.lacks}; {would}{apart}"

    def _more(self) -> str | None:
        """The fewest more of the same that do."""
        for changes in CHANGES:
            factor = 2
            while factor <= MOST_FACTOR:
                if (way := self._fitting(self.devices.times(factor), changes)) is not None:
                    return way
                factor *= 2
        return None

    def _larger(self, known: Mapping[str, Device]) -> str | None:
        """As many of the smallest larger kind that does."""
        mine = self.devices.student
        larger = [
            Pool(name, device, mine.count, mine.per_node)
            for name, device in sorted(known.items(), key=lambda entry: entry[1].memory)
            if device.kind == mine.device.kind and device.memory > mine.device.memory
        ]
        for changes in CHANGES:
            for pool in larger if self.devices.is_one else ():
                if (way := self._fitting(replace(self.devices, teacher=pool, student=pool), changes)) is not None:
                    return way
        return None

    def _fitting(self, devices: Devices, changes: tuple[Change, ...]) -> str | None:
        """``devices`` in words, with what has to be set, if something fits them."""
        if not search(self.config, self.pair, devices, changes, processes=self.processes).layouts:
            return None
        return " ".join([str(devices), *(f"with --set {text}" for text in changed(self.config, changes)[1])])
