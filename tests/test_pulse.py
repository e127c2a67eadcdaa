"""Signs of life: an engine that moves, an answer; and who did not look cannot say that there were none."""

from __future__ import annotations

import pytest

from distill.vllm import pulse
from distill.vllm.pulse import Pulse

ENGINE = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} 0.0
vllm:generation_tokens_total{{engine="0"}} {count}
vllm:generation_tokens_created{{engine="0"}} {created}
process_cpu_seconds_total {created}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse, "time", clock)
    return clock


def look(one: Pulse, clock: Clock, metrics: str | None, times: int = 1) -> float:
    """The silence after so many looks."""
    for _ in range(times):
        clock.now += pulse.PROBE_SECONDS
        one.note(metrics)
    return one.silence


def test_only_an_engine_that_moves_is_a_sign(clock: Clock) -> None:
    one = Pulse()
    assert look(one, clock, ENGINE.format(running=3, count=7, created=1)) == 0
    # What the process around the engine does is none.
    assert look(one, clock, ENGINE.format(running=3, count=7, created=2), 5) == 5 * pulse.PROBE_SECONDS
    assert look(one, clock, None, 2) == 7 * pulse.PROBE_SECONDS
    assert look(one, clock, ENGINE.format(running=3, count=8, created=2)) == 0
    assert not one.is_idle
    look(one, clock, ENGINE.format(running=0, count=8, created=2))
    assert one.is_idle


def test_a_server_that_tells_nothing_lives_as_long_as_it_answers(clock: Clock) -> None:
    one = Pulse()
    assert look(one, clock, "", 50) == 0
    assert look(one, clock, None, 50) == 50 * pulse.PROBE_SECONDS > pulse.STALL_SECONDS
    assert not one.is_idle


def test_time_in_which_nobody_looked_does_not_count(clock: Clock) -> None:
    one = Pulse()
    same = ENGINE.format(running=3, count=7, created=1)
    look(one, clock, same)
    clock.now += 3600
    assert look(one, clock, same) == 0
    assert look(one, clock, same, 4) == 4 * pulse.PROBE_SECONDS
