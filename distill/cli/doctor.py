"""``distill doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from distill.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Look whether this machine can do the work; name the cure for whatever stands in the way.

    Python, the libraries and their pins, the GPU, memory, disk, vLLM processes that were left behind, the hub and the
    clocks. Exit code 1 where something would make a run fail, else 0.

    Examples:

      distill doctor

      HF_HUB_OFFLINE=1 distill doctor --json
    """
    from pipelines.doctor import examine_machine

    findings = examine_machine()
    healthy = all(finding.state != "failed" for finding in findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        from pipelines.doctor.table import print_findings

        print_findings(findings)
    raise typer.Exit(0 if healthy else 1)
