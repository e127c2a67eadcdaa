"""The stream of an engine in the trainer's process, on a GPU that is played: which one is current, and who waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.checkpoint import open_checkpoint
from distill.family import resolve
from distill.vllm.engine import Engine
from distill.vllm.launch import Launch

pytestmark = pytest.mark.server  # nothing starts, but vLLM has to be there

LEARNER = open_checkpoint(resolve("nano", role="student"))
LOG: list[tuple[str, ...]] = []
"""What was done, in order: (who waits, for whom) or (call, the stream it is on, Triton's precision)."""
LOCAL = threading.local()


class Stream:
    num = 0

    def __init__(self, name: str | None = None) -> None:
        Stream.num += 1
        self.name = name or f"stream {Stream.num}"

    def wait_stream(self, other: Stream) -> None:
        LOG.append((self.name, other.name))


DEFAULT = Stream("default")


def current(device: object = None) -> Stream:
    return getattr(LOCAL, "stream", DEFAULT)


def make_current(stream: Stream) -> None:
    LOCAL.stream = stream


class Block:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = current()
        make_current(self.stream)

    def __exit__(self, *_: object) -> None:
        make_current(self.before)


class Vllm:
    """What the engine calls. It takes the stream that it begins on for its own, and makes it current now and then."""

    def __init__(self) -> None:
        self.own = current()
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self._note("start")

    def _note(self, what: str) -> None:
        LOG.append((what, current().name, os.environ.get("TRITON_F32_DEFAULT", "")))
        make_current(self.own)

    def step(self) -> list[Any]:
        self._note("step")
        return []

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        LOG.extend(("weight", current().name) for _ in kwargs["weights_iterator"])
        self._note(method)

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self._note("reset")
        return True

    def sleep(self, level: int) -> None:
        self._note("sleep")

    def wake_up(self, parts: list[str]) -> bool:
        self._note("wake")
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda arguments, usage_context: Vllm())
    monkeypatch.setattr("distill.vllm.engine._devices", lambda on_gpu: [])
    for name, value in {"Stream": Stream, "stream": Block, "current_stream": current}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    LOG.clear()
    LOCAL.__dict__.clear()
    made: list[Engine] = []

    def make(**changes: Any) -> Engine:
        settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "on_gpu": True, "whose": "student"}
        made.append(Engine(Launch(LEARNER, "generate", **{**settings, **changes}), log=tmp_path / "log"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def use(engine: Engine) -> None:
    engine.start()
    engine.sleep(2)
    engine.wake("weights")
    engine.take_weights((name, torch.zeros(1)) for name in "ab")
    engine.wake("kv_cache")
    engine.forget_prefixes()
    engine.step()


CALLS = ("start", "sleep", "wake", "reload_weights", "wake", "reset", "step")


def test_every_call_is_on_the_stream_that_vllm_began_on_and_the_trainers_stays(engine: Callable[..., Engine]) -> None:
    one = engine()
    use(one)
    assert current() is DEFAULT
    own = next(entry[1] for entry in LOG if entry[0] == "start")
    assert own != "default"
    assert [entry[:2] for entry in LOG if len(entry) == 3] == [(call, own) for call in CALLS]
    # Adapters are merged where they are read.
    assert LOG.count(("weight", own)) == 2
    # Another thread samples at staleness 1; it has never made a stream current.
    seen: list[Stream] = []
    thread = threading.Thread(target=lambda: (one.step(), seen.append(current())))  # type: ignore[func-returns-value]
    thread.start()
    thread.join()
    assert LOG[-2][:2] == ("step", own) and seen == [DEFAULT]


def test_vllm_waits_for_what_the_trainer_did_and_the_trainer_for_vllm(engine: Callable[..., Engine]) -> None:
    one = engine()
    use(one)
    own = next(entry[1] for entry in LOG if entry[0] == "start")
    calls = [number for number, entry in enumerate(LOG) if len(entry) == 3]
    for number in calls:
        before = max(place for place in range(number) if LOG[place] == (own, "default"))
        assert all(LOG[place] == ("weight", own) for place in range(before + 1, number))
        assert LOG[number + 1] == ("default", own)
    LOG.clear()
    one._engine.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.step()
    assert [(own, "default"), ("default", own)] == LOG and current() is DEFAULT


def test_float32_is_exact_whenever_a_kernel_is_compiled(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def precisions(**changes: Any) -> set[str]:
        LOG.clear()
        use(engine(**changes))
        return {entry[2] for entry in LOG if len(entry) == 3}

    assert precisions() == {"ieee"} and "TRITON_F32_DEFAULT" not in os.environ
    assert precisions(dtype="bfloat16") == {""}
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")  # the user's own
    assert precisions() == {"tf32x3"} and os.environ["TRITON_F32_DEFAULT"] == "tf32x3"
