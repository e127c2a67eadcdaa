"""Devices as a plan sees them: a table of figures, and what ``--gpus 2x8xH100`` means.

Three tables lie over each other: the shipped ``hardware.yaml``; the user's, under the configuration folder or named;
and what ``distill plan --calibrate`` measured of this machine. A figure that a later table leaves out stays.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from distill.cache import cache_home
from distill.errors import UserError
from distill.recipe import merge, parse_yaml, validate_as
from distill.settings import Settings

Number = Literal["fp32", "bf16", "fp8"]
"""Number types that a device multiplies in."""

Work = Literal["train", "score", "sample", "serve"]
"""Kinds of work, each with a speed of its own: a training pass, a forward pass over whole sequences, decoding in the
trainer's process, decoding in a vLLM server."""

PER_NODE = 8
"""Devices of a machine where nothing is said of machines."""

MOST = 100_000
"""Devices that a plan is made for at most."""

CalibratedShare = Annotated[float, Field(ge=1e-9, le=4.0)]
"""Of a peak; a measured one may be above 1, where the peak was measured on other shapes."""


Figure = Annotated[float, Field(ge=1e-6, le=1e9)]
"""What some device could have; a plan divides by it, and multiplies it."""
Microseconds = Annotated[float, Field(ge=0.0, le=1e9)]
Dollars = Annotated[float, Field(gt=0.0, le=1e6)]


class Tera(Settings):
    """10^12 FLOP/s by number type; null where the device does not multiply in it."""

    fp32: Figure
    bf16: Figure
    fp8: Figure | None = None


class Shares(Settings):
    """What each kind of work reaches of the peak FLOP/s, a dense model's."""

    train: CalibratedShare = 0.4
    score: CalibratedShare = 0.5
    sample: CalibratedShare = 0.5
    serve: CalibratedShare = 0.5


class Latency(Settings):
    """Microseconds that one pass through one layer costs, however little it works on."""

    train: Microseconds = 2000.0
    score: Microseconds = 500.0
    sample: Microseconds = 250.0
    serve: Microseconds = 60.0


class Device(Settings):
    """One kind of device. Figures as in ``hardware.yaml``."""

    kind: Literal["gpu", "cpu"] = "gpu"
    memory: Figure
    """10^9 bytes."""
    bandwidth: Figure
    """Of the memory, 10^9 bytes a second."""
    tflops: Tera
    link: Figure
    """To another device of the machine, one direction, 10^9 bytes a second."""
    network: Figure
    """To another machine, this device's share, one direction, 10^9 bytes a second."""
    source: str
    """Where the figures are from."""
    usd_per_hour: Dollars | None = None
    """What an hour of it costs; ``--price`` wins."""
    shares: Shares = Shares()
    bandwidth_share: CalibratedShare = 0.7
    """What is reached of ``bandwidth``, ``link`` and ``network``."""
    latency: Latency = Latency()
    measured: str | None = None
    """When and how ``distill plan --calibrate`` measured it; null for figures from elsewhere."""

    def peak(self, number: Number) -> float:
        """FLOP/s. What a device has no units for, it multiplies in bf16."""
        tera = self.tflops
        found = {"fp32": tera.fp32, "bf16": tera.bf16, "fp8": tera.fp8 or tera.bf16}[number]
        return found * 1e12


@dataclass(frozen=True, slots=True)
class Pool:
    """``count`` devices of one kind, ``per_node`` in each machine.

    >>> str(Pool("H100", None, 16, 8))
    '2x8xH100'
    """

    name: str
    device: Device
    count: int
    per_node: int

    def __str__(self) -> str:
        nodes, rest = divmod(self.count, self.per_node)
        return f"{self.count}x{self.name}" if rest or nodes == 1 else f"{nodes}x{self.per_node}x{self.name}"

    @property
    def bytes(self) -> int:
        """Of one device."""
        return int(self.device.memory * 1e9)

    def of(self, count: int) -> Pool:
        """So many devices of the same kind."""
        return Pool(self.name, self.device, count, self.per_node)


def config_home() -> Path:
    """``$XDG_CONFIG_HOME/strong-to-weak``, or ``~/.config/strong-to-weak``."""
    chosen = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".config") / "strong-to-weak"


def calibration_file() -> Path:
    """Where the figures that were measured of this machine are kept."""
    return cache_home() / "calibration.yaml"


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """Every known device by name. ``extra`` is a file of the user's that wins over all others.

    Raises UserError for a file that cannot be read or says something that no device has.
    """
    tree = _read(Path(str(files("distill") / "hardware.yaml")))
    for path in (config_home() / "hardware.yaml", calibration_file()):
        if path.is_file():
            tree = merge(tree, _read(path))
    if extra is not None:
        tree = merge(tree, _read(extra))
    return {
        name: validate_as(Device, figures, where=f"the device {name} of the hardware table")
        for name, figures in tree.items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hardware table {path} cannot be read: {error}") from None
    tree = parse_yaml(text, where=f"the hardware table {path}")
    if not isinstance(tree, dict) or not all(isinstance(figures, dict) for figures in tree.values()):
        raise UserError(
            f"the hardware table {path} is not devices with figures below them; write for example\n"
            "MI300X:\n  memory: 192\n  bandwidth: 5300\n  tflops: {fp32: 163.4, bf16: 1307, fp8: 2615}\n"
            "  link: 448\n  network: 50\n  source: the maker's datasheet"
        )
    return {str(name): figures for name, figures in tree.items()}


_SPEC = re.compile(r"(?:(?:([0-9]{1,9})\s*[xX*]\s*)?([0-9]{1,9})\s*[xX*]\s*)?(\S(?:.*\S)?)", re.ASCII)


def parse_pool(text: str, devices: Mapping[str, Device], *, option: str = "--gpus") -> Pool:
    """``8xH200``, ``H200``, or ``2x8xH100`` for two machines of eight. Raises UserError for anything else."""
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{option} {text!r} names no device; write COUNTxNAME, for example 8xH200")
    nodes, each, written = found.groups()
    name = _find(written, devices, option=option, text=text)
    each_count, num_nodes = int(each or 1), int(nodes or 1)
    count = each_count * num_nodes
    if not 1 <= count <= MOST:
        raise UserError(f"{option} {text!r} is {count} devices; a plan is made for 1 to {MOST}")
    return Pool(name, devices[name], count, each_count if nodes else PER_NODE)


def _find(written: str, devices: Mapping[str, Device], *, option: str, text: str) -> str:
    plain = {_plain(name): name for name in devices}
    if _plain(written) in plain:
        return plain[_plain(written)]
    # The beginning of a name is only a hint: an H20 is no H200, and an L40 no L40S.
    begin = [name for key, name in plain.items() if _plain(written) and key.startswith(_plain(written))]
    near = begin or [plain[key] for key in difflib.get_close_matches(_plain(written), plain, n=3, cutoff=0.5)]
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise UserError(
        f"{option} {text!r}: no device is called {written!r}; {hint}known: {', '.join(devices)}; write COUNTxNAME or "
        f"NODESxCOUNTxNAME, and put another device into a file for --hardware"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower().removeprefix("nvidia").replace("geforce", "")


def with_price(pool: Pool, price: float | None) -> Pool:
    """The pool at ``price`` USD a device and hour; None leaves the table's."""
    if price is None:
        return pool
    return Pool(pool.name, pool.device.model_copy(update={"usd_per_hour": price}), pool.count, pool.per_node)


def named_like(name: str, memory: float, devices: Mapping[str, Device]) -> str:
    """The device of the table that a driver calls ``name``: of those whose letters begin it, the nearest in memory.

    >>> named_like("Tesla T4", 16, {})
    'Tesla T4'
    """
    like = [known for known in devices if _plain(name).startswith(_plain(known.partition("-")[0]))]
    return min(like, key=lambda known: abs(devices[known].memory - memory)) if like else name
