"""Findings on a terminal: a line each, the cure below what is not well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from pipelines.doctor.finding import Finding
from pipelines.listing import output

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def print_findings(findings: Sequence[Finding]) -> None:
    console = output()
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        state = Text(f"{finding.state:<7}", style=_STYLES[finding.state])
        console.print(state + Text(f"  {finding.check:<{width}}  {finding.text}"))
        if finding.cure is not None:
            console.print(f"{'':7}  {'':{width}}  cure: {finding.cure}")
    counts = Counter(finding.state for finding in findings)
    console.print(f"\n{counts['failed']} failed, {counts['warning']} to be warned of, {counts['ok']} well")
