"""How long a device takes: whichever of arithmetic, memory and wire is slowest, and what every pass costs besides.

    seconds = max(FLOPs / (peak share), bytes / (bandwidth share), wire bytes / (link share)) + passes x latency

The roofline model (Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009), with the wire as a third
roof, as in arXiv 2211.05102, section 2. The three are taken to overlap wholly; a layer's kernel launches, which the
smallest models and batches consist of, to overlap with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.hardware import Device, Number, Work

Bottleneck = Literal["compute", "memory bandwidth", "wire", "latency"]

EXPERTS_SHARE = 0.5
"""What a mixture of experts reaches of a dense model's share: its products are many and small."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one device has to do: FLOPs in a number type, bytes to and from its memory and over its wire, and
    passes through layers."""

    flops: float = 0.0
    memory: float = 0.0
    wire: float = 0.0
    passes: float = 0.0


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds by what they are spent on."""

    compute: float = 0.0
    memory: float = 0.0
    wire: float = 0.0
    latency: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.wire) + self.latency

    @property
    def bottleneck(self) -> Bottleneck:
        """What it would pay most to have more of."""
        names: list[tuple[float, Bottleneck]] = [
            (self.compute, "compute"),
            (self.memory, "memory bandwidth"),
            (self.wire, "wire"),
            (self.latency, "latency"),
        ]
        return max(names, key=lambda entry: entry[0])[1]


def times(
    demand: Demand, device: Device, work: Work, number: Number, *, experts: bool = False, wire_rate: float = 1.0
) -> Times:
    """How long ``device`` takes; ``wire_rate`` is its wire's, bytes a second before the share that is reached."""
    share = dict(device.shares)[work] * (EXPERTS_SHARE if experts else 1.0)
    latency = dict(device.latency)[work] * 1e-6
    return Times(
        compute=demand.flops / (device.peak(number) * share),
        memory=demand.memory / (device.bandwidth * 1e9 * device.bandwidth_share),
        wire=demand.wire / (wire_rate * device.bandwidth_share),
        latency=demand.passes * latency,
    )
