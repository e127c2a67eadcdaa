"""What every page of this package is made with: the templates, and numbers and names as a reader wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eval.figure import short
from eval.visible import visible

MODE_NAMES = {"think": "thinking", "no_think": "non-thinking"}

Document = dict[str, Any]
"""A JSON object of a run directory."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its title and the legend's (colour, style, label) entries (none for a single line).

    ``views`` are the same lines against each x axis, by the axis' name.
    """

    title: str
    views: Mapping[str, Markup]
    legend: tuple[tuple[int, str, str], ...] = ()


def page(template: str, **content: object) -> str:
    """The page that ``template`` makes of ``content``. All text is escaped, and shown as ``visible`` makes it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "count": count,
        "short": short,
        "seconds": duration,
        "bytes": size,
        "named": named,
    }
    return environment.get_template(template).render(mode_names=MODE_NAMES, **content)


def _shown(value: object) -> object:
    # What is marked as markup has gone through here, or through the figure's own escaping, before.
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def named(name: str) -> str:
    """The name of a checkpoint, stage or arm as a page writes it."""
    return name.replace("_", "-")


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def interval(ends: tuple[float, float]) -> str:
    """The ends of an interval of shares, in percent."""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def count(value: float) -> str:
    """A whole number with thousands apart, or 1.23e+14 from a billion on."""
    return f"{value:.2e}" if abs(value) >= 1e9 else f"{round(value):,}"


def duration(value: float) -> str:
    """Seconds for a reader: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
