"""The client against servers that lie, fail, vanish and come back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from distill.checkpoint import final_norm, lm_head, load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.errors import DistillError, GoneError, StoppedError, UserError
from distill.family import resolve
from distill.types import Prompt, Request, Rollout, Sampling
from distill.vllm.client import Client, Job
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import free_port
from teachers.remote import RemoteTeacher, Wire
from teachers.roles import find_role

TEACHER = open_checkpoint(resolve("tiny", role="teacher"))
ENCODER = Encoder(load_tokenizer(TEACHER))
WIDTH, VOCABULARY = TEACHER.shape.width, TEACHER.shape.vocabulary
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}
ON_THE_WIRE: dict[Wire, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
STOP = ENCODER.stop_ids[0]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.client._FIRST_PAUSE", 0.02)


Answer = tuple[int, dict[str, str], bytes]
Handle = Callable[[str, dict[str, Any]], Answer]


def models(path: str) -> Answer:
    return 200, {}, json.dumps({"data": [{"id": "tiny"}]}).encode()


@contextmanager
def serving(handle: Handle, port: int = 0, get: Callable[[str], Answer] = models) -> Iterator[str]:
    """A server on loopback that answers POST with ``handle(path, body)`` and GET with ``get(path)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(handle(self.path, body))

        def _answer(self, answer: Answer) -> None:
            status, headers, content = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # whoever asked no longer wants to know
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rollout(number: int, *, prompt: int = 3, response: int = 2) -> Rollout:
    ids = tuple((7 * number + place) % VOCABULARY for place in range(prompt))
    request = Request(Prompt(({"role": "user", "content": str(number)},)), "think", "hard", ids, Sampling(64), number)
    said = tuple((number + place) % VOCABULARY for place in range(response))
    return Rollout(request, said, (False,) * response, (-1.0,) * response, "length", "student")


def honest_states(ids: list[int]) -> torch.Tensor:
    """Rows that the teacher's final norm could have made; a row's token is written in its signs."""
    signs = torch.tensor([[1.0 if (token >> (place % 8)) & 1 else -1.0 for place in range(WIDTH)] for token in ids])
    return signs * final_norm(TEACHER)


def pooled(body: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor] = lambda states: states) -> Answer:
    data, content = [], b""
    for index, ids in enumerate(body["input"]):
        states = change(honest_states(ids)).to(DTYPES[body["embed_dtype"]])
        raw = states.contiguous().view(torch.uint8).numpy().tobytes()
        place = {"start": len(content), "end": len(content) + len(raw)}
        data.append({"index": index, "embed_dtype": body["embed_dtype"], "shape": list(states.shape), **place})
        content += raw
    return 200, {"metadata": json.dumps({"data": data})}, content


def score(
    handle: Handle, rollouts: list[Rollout], *, wire: Wire = "fp32", patience: float = 10.0
) -> list[torch.Tensor]:
    with serving(handle) as url, Client([url], width=1000, patience=patience) as client:
        teacher = RemoteTeacher(client, TEACHER, wire=wire, dtype=torch.float32, device=torch.device("cpu"))
        return [states.states_Rd for states in teacher.score(rollouts)]


@pytest.mark.parametrize("wire", ON_THE_WIRE)
def test_states_come_back_to_their_rollouts_and_only_the_rows_of_the_response(wire: Wire) -> None:
    rollouts = [rollout(number, prompt=1 + number % 5, response=1 + number % 7) for number in range(80)]
    scored = score(lambda path, body: pooled(body), rollouts, wire=wire)
    for one, states in zip(rollouts, scored, strict=True):
        predicting = [*one.prompt_ids, *one.response_ids][len(one.prompt_ids) - 1 : -1]
        assert torch.equal(states, honest_states(predicting).to(ON_THE_WIRE[wire]).float())


def test_the_head_is_the_checkpoint_s() -> None:
    with Client(["http://127.0.0.1:9"], width=1) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="bf16", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert torch.equal(teacher.head_VD, lm_head(TEACHER, torch.bfloat16))


def break_metadata(**change: Any) -> Handle:
    def handle(path: str, body: dict[str, Any]) -> Answer:
        status, headers, content = pooled(body)
        data = json.loads(headers["metadata"])["data"]
        data[0] |= change
        return status, {"metadata": json.dumps({"data": data})}, content

    return handle


def with_nan(states: torch.Tensor) -> torch.Tensor:
    states[1, 3] = float("nan")
    return states


SERVE_IT = "serve this teacher with `distill teacher serve --role score`"

LIES: dict[str, tuple[Handle, str]] = {
    "a row is missing": (lambda path, body: pooled(body, lambda states: states[1:]), r"shape \[3, 160\].*\[4, 160\]"),
    "another width": (
        lambda path, body: pooled(body, lambda states: states[:, 1:]),
        rf"shape \[4, 159\].*another model.*: {SERVE_IT}",
    ),
    "not a number": (lambda path, body: pooled(body, with_nan), "not finite"),
    "scaled to length one": (
        lambda path, body: pooled(body, lambda states: states / states.norm(dim=1, keepdim=True)),
        "final norm of tiny does not make",
    ),
    "before the norm": (lambda path, body: pooled(body, lambda states: 3 * states), "another model"),
    "another number type": (break_metadata(embed_dtype="float16"), f"in float16 and was asked for float32; {SERVE_IT}"),
    "a sequence is missing": (
        lambda path, body: pooled({**body, "input": body["input"][1:]}),
        f"of 1 sequences and was asked for 2; {SERVE_IT}",
    ),
    "blocks that overlap": (break_metadata(end=8), rf"do not follow each other \(.*\); {SERVE_IT}"),
    "cut off": (
        lambda path, body: (*pooled(body)[:2], pooled(body)[2][:-8]),
        rf"bytes of states and announced \d+; {SERVE_IT}",
    ),
    "no header": (lambda path, body: (200, {}, b"{}"), f"metadata header; {SERVE_IT}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_scorer_is_refused_at_once(lie: str) -> None:
    asked = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        asked.append(path)
        return LIES[lie][0](path, body)

    with pytest.raises(DistillError, match=LIES[lie][1]):
        score(handle, [rollout(1), rollout(2)])
    assert asked == ["/pooling"]


def test_server_errors_and_lost_connections_are_asked_again() -> None:
    failures = iter([500, 503, 500])

    def handle(path: str, body: dict[str, Any]) -> Answer:
        status = next(failures, 200)
        return pooled(body) if status == 200 else (status, {}, b'{"error": {"message": "engine is busy"}}')

    assert len(score(handle, [rollout(1)])) == 1
    with pytest.raises(DistillError, match=r"failed 5 times on the same request.*out of luck"):
        score(lambda path, body: (500, {}, b'{"error": {"message": "out of luck"}}'), [rollout(1)])


def test_a_server_that_comes_back_is_waited_for_and_nothing_is_lost_or_doubled() -> None:
    rollouts = [rollout(number) for number in range(200)]
    port = free_port("127.0.0.1")
    with Client([f"http://127.0.0.1:{port}"], width=60, patience=30) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))

        answered, done = threading.Semaphore(0), threading.Event()

        def handle(path: str, body: dict[str, Any]) -> Answer:
            answered.release()
            return pooled(body)

        def come_and_go() -> None:
            with serving(handle, port):
                answered.acquire()
            time.sleep(0.2)
            with serving(handle, port):
                done.wait()

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            scored = teacher.score(rollouts)
        finally:
            done.set()
            thread.join()
    for one, states in zip(rollouts, scored, strict=True):
        assert torch.equal(states.states_Rd, honest_states([*one.prompt_ids, *one.response_ids][2:-1]))


def test_a_server_that_is_gone_for_good_stops_the_run_cleanly() -> None:
    with Client([f"http://127.0.0.1:{free_port('127.0.0.1')}"], width=60, patience=0.5) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        with pytest.raises(StoppedError, match="has not answered") as stopped:
            teacher.score([rollout(1)])
        assert stopped.value.exit_code == 75


def test_a_supervisor_s_word_ends_the_waiting() -> None:
    def gone() -> None:
        raise DistillError("the server ended again and again")

    with Client([f"http://127.0.0.1:{free_port('127.0.0.1')}"], width=60, check=gone) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        with pytest.raises(DistillError, match="again and again"):
            teacher.score([rollout(1)])


def test_what_is_under_way_is_bounded_and_a_slow_replica_gets_less() -> None:
    under_way, most, served = 0, 0, {"fast": 0, "slow": 0}
    lock = threading.Lock()

    def replica(name: str, seconds: float) -> Handle:
        def handle(path: str, body: dict[str, Any]) -> Answer:
            nonlocal under_way, most
            with lock:
                under_way += sum(map(len, body["input"]))
                most = max(most, under_way)
                served[name] += 1
            time.sleep(seconds)
            with lock:
                under_way -= sum(map(len, body["input"]))
            return pooled(body)

        return handle

    # 24 requests of 32 sequences of 10 tokens.
    rollouts = [rollout(number, prompt=2, response=9) for number in range(32 * 24)]
    with (
        serving(replica("fast", 0.01)) as fast,
        serving(replica("slow", 1.0)) as slow,
        Client([fast, slow], width=4 * 320) as client,
    ):
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        teacher.score(rollouts)
    assert 320 <= most <= 4 * 320
    assert served["fast"] + served["slow"] == 24 and served["fast"] > served["slow"] > 0


def test_a_replica_that_was_slow_is_avoided_even_where_all_work_could_go_at_once() -> None:
    served = {"fast": 0, "slow": 0}

    def replica(name: str, seconds: float) -> Handle:
        def handle(path: str, body: dict[str, Any]) -> Answer:
            served[name] += 1
            time.sleep(seconds)
            return pooled(body)

        return handle

    rollouts = [rollout(number, prompt=2, response=9) for number in range(32 * 16)]
    with (
        serving(replica("fast", 0.01)) as fast,
        serving(replica("slow", 3.0)) as slow,
        Client([fast, slow], width=10**6) as client,
    ):
        teacher = RemoteTeacher(client, TEACHER, wire="bf16", dtype=torch.float32, device=torch.device("cpu"))
        teacher.score(rollouts)
        assert served == {"fast": 8, "slow": 8}  # nothing is known of either
        teacher.score(rollouts)
        assert served["slow"] <= 8 + 5  # 8 more, were nothing learnt; a busy machine makes the fast one slow too


def test_what_is_heard_is_judged_while_others_still_speak_and_nothing_depends_on_it() -> None:
    rollouts = [rollout(number, prompt=1 + number % 5, response=1 + number % 7) for number in range(100)]
    asked: list[list[int]] = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        asked.extend(body["input"])
        return pooled(body)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        reference = teacher.score(rollouts)
        for order in (rollouts, rollouts[::-1], rollouts[::3]):
            asked.clear()
            for one in order:
                teacher.hear(one)
            deadline = time.monotonic() + 10
            while len(asked) < 1 + (len(order) - 1) // 32 * 32 and time.monotonic() < deadline:
                time.sleep(0.01)
            # The first one, and whole requests of the others, are on their way before anybody asks.
            assert len(asked) >= 1 + (len(order) - 1) // 32 * 32
            scored = teacher.score(rollouts)
            assert len(asked) == len(rollouts)  # and each is asked for once
            for ours, theirs in zip(reference, scored, strict=True):
                assert torch.equal(ours.states_Rd, theirs.states_Rd)


def test_two_batches_are_judged_at_once_and_neither_takes_the_others_answers() -> None:
    """The one that is asked for, and the one that is still being spoken behind it, in another thread."""
    first = [rollout(number, prompt=3, response=2 + number % 5) for number in range(40)]
    second = [rollout(100 + number, prompt=4, response=2 + number % 7) for number in range(50)]
    asked: list[list[int]] = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        asked.extend(body["input"])
        time.sleep(0.05)
        return pooled(body)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        references = teacher.score(first), teacher.score(second)
        teacher.worked()
        asked.clear()
        begun = time.perf_counter()
        for one in first:
            teacher.hear(one)
        teacher.heard_all()  # the last eight would wait for company otherwise

        def speak() -> None:
            for one in second:
                teacher.hear(one)
                time.sleep(0.001)
            teacher.heard_all()

        speaker = threading.Thread(target=speak)
        speaker.start()
        ours = teacher.score(first)
        spans = teacher.worked()
        speaker.join()
        deadline = time.monotonic() + 10
        while len(asked) < 90 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(asked) == 90  # all is on its way before anybody asks
        time.sleep(0.3)
        found = time.perf_counter()
        theirs = teacher.score(second)
        assert len(asked) == 90  # and nothing is asked twice
        for reference, scored in zip(references, (ours, theirs), strict=True):
            for right, mine in zip(reference, scored, strict=True):
                assert torch.equal(right.states_Rd, mine.states_Rd)
        # When the requests were under way, not when somebody came for their answers.
        assert spans and all(begun <= begin < end for begin, end in spans)
        later = teacher.worked()
        assert later and all(begin < end < found for begin, end in later)
        assert teacher.worked() == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_goes_wrong_with_a_batch_is_told_to_whoever_asks_for_it_and_not_to_the_one_behind() -> None:
    first = [*(rollout(number) for number in range(39)), rollout(39, prompt=5)]
    second = [rollout(100 + number) for number in range(5)]

    def handle(path: str, body: dict[str, Any]) -> Answer:
        broken = any(len(ids) == 6 for ids in body["input"])  # the first batch's last
        return pooled(body, with_nan if broken else lambda states: states)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        submitted = list[Any]()
        follow_up = client.follow_up  # what every request comes to
        client.follow_up = lambda job, ask: submitted.append(follow_up(job, ask)) or submitted[-1]  # type: ignore
        for one in first:
            teacher.hear(one)
        teacher.heard_all()
        until(lambda: all(future.done() for future in submitted))
        assert any(future.exception() for future in submitted)
        for one in second:
            teacher.hear(one)
        teacher.heard_all()
        with pytest.raises(DistillError, match="not finite"):
            teacher.score(first)
        assert len(teacher.score(second)) == 5


def test_a_batch_that_breaks_off_leaves_the_one_before_it_alone_and_the_end_ends_both() -> None:
    first, second = [rollout(number) for number in range(40)], [rollout(100 + number) for number in range(33)]
    asked, leave = list[list[int]](), threading.Event()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        asked.extend(body["input"])
        leave.wait(20)
        return pooled(body)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))

        def hear(rollouts: list[Rollout]) -> None:
            for one in rollouts:
                teacher.hear(one)

        try:
            hear(first)
            teacher.heard_all()
            hear(second)
            until(lambda: len(asked) == 40 + 32)
            load = client.replicas[0].load
            teacher.break_off()
            until(lambda: 0 < client.replicas[0].load < load)
            leave.set()
            scored = teacher.score(first)
            assert len(asked) == 40 + 32  # nothing of it had to be asked again
            for one, states in zip(first, scored, strict=True):
                assert torch.equal(states.states_Rd, honest_states([*one.prompt_ids, *one.response_ids][2:-1]))
            leave.clear()
            hear(first)
            teacher.heard_all()
            hear(second)
            until(lambda: len(asked) == 2 * (40 + 32))
            teacher.forget()
            until(lambda: client.replicas[0].load == 0)
        finally:
            leave.set()


def test_servers_that_work_on_the_batch_before_are_not_idle() -> None:
    """Waited for or not: what ends meanwhile waits for company, and does not go by itself."""
    first, second = [rollout(number) for number in range(4)], [rollout(100 + number) for number in range(5)]
    sizes, leave = list[int](), threading.Event()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        sizes.append(len(body["input"]))
        leave.wait(20)
        return pooled(body)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        try:
            for one in first:
                teacher.hear(one)
            teacher.heard_all()
            until(lambda: sorted(sizes) == [1, 3])
            teacher.hear(second[0])  # nobody waits for the first batch yet
            scored = list[int]()
            thread = threading.Thread(target=lambda: scored.append(len(teacher.score(first))))
            thread.start()
            until(lambda: not teacher._hearing._closed)
            for one in second[1:]:
                teacher.hear(one)
            time.sleep(0.1)
            assert sorted(sizes) == [1, 3]
        finally:
            leave.set()
        thread.join()
        assert scored == [4]
        teacher.heard_all()
        teacher.score(second)
        assert sizes[2:] == [5]


def test_what_waits_for_company_goes_when_the_servers_are_done_and_not_when_the_next_one_ends() -> None:
    sizes, leave = list[int](), threading.Event()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        sizes.append(len(body["input"]))
        leave.wait(20)
        return pooled(body)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        begun = list[None]()
        client.before = lambda: begun.append(None)
        said = [rollout(number) for number in range(6)]
        try:
            for one in said:
                teacher.hear(one)
            until(lambda: sizes == [1])
            time.sleep(0.1)
            assert sizes == [1]
        finally:
            leave.set()
        until(lambda: sizes == [1, 5])
        # Where a server has just answered, none is to be started: that could take the thread that talks to them.
        assert len(begun) == 1
        assert len(teacher.score(said)) == 6 and sizes == [1, 5]


def test_what_waits_for_company_stays_where_a_request_before_it_failed() -> None:
    sizes, leave = list[int](), threading.Event()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        sizes.append(len(body["input"]))
        leave.wait(20)
        return pooled(body, with_nan)

    with serving(handle) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        try:
            for number in range(6):
                teacher.hear(rollout(number))
        finally:
            leave.set()
        until(lambda: sizes == [1])
        until(lambda: client.replicas[0].load == 0)
        time.sleep(0.1)
        assert sizes == [1]
        with pytest.raises(DistillError, match="not finite"):
            teacher.hear(rollout(7))


def test_an_abandoned_step_ends_what_is_under_way() -> None:
    arrived, leave = threading.Semaphore(0), threading.Event()

    def handle(path: str, body: dict[str, Any]) -> Answer:
        arrived.release()
        leave.wait(20)
        return pooled(body)

    with serving(handle) as url:
        try:
            with Client([url], width=1000) as client:
                teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
                for number in range(64):
                    teacher.hear(rollout(number))
                assert arrived.acquire(timeout=10) and arrived.acquire(timeout=10)
                assert all(replica.load > 0 for replica in client.replicas)
                teacher.forget()
                deadline = time.monotonic() + 10
                while any(replica.load for replica in client.replicas) and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert all(replica.load == 0 for replica in client.replicas)
                # One that is left at the end of the client ends with it.
                for number in range(32):
                    teacher.hear(rollout(number))
                assert arrived.acquire(timeout=10)
        finally:
            leave.set()


def test_a_lie_about_what_was_heard_is_noticed_at_the_next_word() -> None:
    with serving(LIES["not a number"][0]) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        with pytest.raises(DistillError, match="not finite"):
            for number in range(1000):
                teacher.hear(rollout(number))
                time.sleep(0.01)


def test_a_lie_about_what_was_heard_is_noticed_though_nobody_speaks() -> None:
    with serving(LIES["not a number"][0]) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        teacher.check()
        teacher.hear(rollout(1))
        with pytest.raises(DistillError, match="not finite"):
            for _ in range(1000):
                teacher.check()
                time.sleep(0.01)
        teacher.break_off()
        teacher.check()


def test_a_teacher_that_is_gone_for_good_is_noticed_while_others_still_speak() -> None:
    gone = [False]

    def check() -> None:
        if gone[0]:
            raise GoneError("the server has ended")

    with Client([f"http://127.0.0.1:{free_port('127.0.0.1')}"], width=1000, check=check) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        teacher.hear(rollout(1))
        teacher.hear(rollout(2))
        gone[0] = True
        with pytest.raises(GoneError, match="has ended"):
            teacher.hear(rollout(3))
        teacher.forget()
        until(teacher._hearing._is_idle)
        # Nothing is under way: those on duty may be of another role, and the next request has its own started.
        teacher.hear(rollout(4))
        teacher.forget()


ENGINE = 'vllm:num_requests_running{{engine="0"}} 3.0\nvllm:generation_tokens_total{{engine="0"}} {count}\n'


def engine_says(count: Callable[[], int]) -> Callable[[str], Answer]:
    def get(path: str) -> Answer:
        return (200, {}, ENGINE.format(count=count()).encode()) if path == "/metrics" else models(path)

    return get


@pytest.fixture
def short_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.vllm.pulse.PROBE_SECONDS", 0.1)
    monkeypatch.setattr("distill.vllm.pulse.STALL_SECONDS", 0.6)


@pytest.mark.usefixtures("short_stall")
def test_a_server_that_hangs_is_left_for_one_that_does_not() -> None:
    leave = threading.Event()

    def hang(path: str, body: dict[str, Any]) -> Answer:
        leave.wait(30)
        return pooled(body)

    rollouts = [rollout(number) for number in range(32 * 8)]
    with (
        serving(hang, get=engine_says(lambda: 7)) as stuck,
        serving(lambda path, body: pooled(body)) as well,
        Client([stuck, well], width=10**6) as client,
    ):
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        try:
            started = time.monotonic()
            assert len(teacher.score(rollouts)) == len(rollouts)
            assert time.monotonic() - started < 15
            assert [replica.has_hung for replica in client.replicas] == [True, False]
        finally:
            leave.set()


@pytest.mark.usefixtures("short_stall")
def test_a_server_that_hangs_alone_stops_the_run_and_one_that_comes_back_goes_on() -> None:
    leave, count = threading.Event(), 0

    def hang(path: str, body: dict[str, Any]) -> Answer:
        leave.wait(30)
        return pooled(body)

    with serving(hang, get=engine_says(lambda: count)) as url:
        try:
            with Client([url], width=1000, patience=0.5) as client:
                teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
                with pytest.raises(StoppedError, match=r"no sign of life|it has hung") as stopped:
                    teacher.score([rollout(1)])
                assert stopped.value.exit_code == 75
                leave.set()
                count = 1
                assert len(teacher.score([rollout(1)])) == 1
        finally:
            leave.set()


@pytest.mark.usefixtures("short_stall")
def test_a_server_that_is_merely_slow_is_waited_for() -> None:
    asked = []

    def slow(path: str, body: dict[str, Any]) -> Answer:
        asked.append(path)
        time.sleep(2.0)
        return pooled(body)

    started = time.monotonic()
    with (
        serving(slow, get=engine_says(lambda: int(10 * (time.monotonic() - started)))) as url,
        Client([url], width=1000) as client,
    ):
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        assert len(teacher.score([rollout(1, prompt=40)])) == 1
    assert asked == ["/pooling"]


@pytest.mark.usefixtures("short_stall")
@pytest.mark.parametrize("at_work", [True, False])
def test_a_request_is_given_up_when_its_time_is_over_but_not_by_a_server_at_work(
    monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    """Hundreds that share a slow server take hundreds of times as long as one alone; sent again, they never end."""
    monkeypatch.setattr("distill.vllm.client.SLOWEST_TOKENS_PER_SECOND", 1e9)
    asked = []

    def slow(path: str, body: dict[str, Any]) -> Answer:
        asked.append(path)
        if at_work or len(asked) == 1:
            time.sleep(2.0)
        return pooled(body)

    started = time.monotonic()
    says = engine_says(lambda: int(10 * (time.monotonic() - started)))

    def get(path: str) -> Answer:
        status, headers, content = says(path)
        # The request was lost where nothing is under way; what moves is another one's number.
        return status, headers, content if at_work else content.replace(b"} 3.0", b"} 0.0")

    with serving(slow, get=get) as url, Client([url], width=1000) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        assert len(teacher.score([rollout(1, prompt=40)])) == 1
    assert len(asked) == (1 if at_work else 2)


def test_a_server_is_asked_what_it_is_for() -> None:
    def having(*routes: str) -> Callable[[str], Answer]:
        return lambda path: (405 if path in routes else 404, {}, b"")

    def refuse(path: str, body: dict[str, Any]) -> Answer:
        return 500, {}, b""

    with serving(refuse, get=having("/pooling", "/v1/embeddings")) as url:
        assert find_role(url) == find_role(url + "/v1") == "score"
    with serving(refuse, get=having("/v1/completions", "/v1/chat/completions")) as url:
        assert find_role(url) == "generate"
    with (
        serving(refuse, get=having("/v1/embeddings")) as url,
        pytest.raises(UserError, match=rf"{url} neither scores nor generates.*/pooling: status 404"),
    ):
        find_role(url)
    with (
        serving(refuse, get=lambda path: (401, {}, b"")) as url,
        pytest.raises(UserError, match="DISTILL_TEACHER_API_KEY"),
    ):
        find_role(url)
    with pytest.raises(StoppedError, match="has not answered") as stopped:
        find_role(f"http://127.0.0.1:{free_port('127.0.0.1')}", patience=0.1)
    assert stopped.value.exit_code == 75


def test_a_key_is_sent_and_its_refusal_says_where_it_goes() -> None:
    with serving(lambda path, body: (401, {}, b'{"error": "Unauthorized"}')) as url, Client([url], width=9) as client:
        teacher = RemoteTeacher(client, TEACHER, wire="fp32", dtype=torch.float32, device=torch.device("cpu"))
        with pytest.raises(UserError, match="DISTILL_TEACHER_API_KEY"):
            teacher.score([rollout(1)])


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "localhost"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="no URL"):
        Client([url], width=1)


def test_one_that_fails_cancels_the_others() -> None:
    async def ask(number: int) -> int:
        if number == 3:
            raise DistillError("three")
        return number

    with Client(["http://127.0.0.1:9"], width=1) as client:
        with pytest.raises(DistillError, match="three"):
            list(client.each([Job(number, 1) for number in range(10)], ask))
        assert sorted(item for item, _ in client.each([Job(number, 5) for number in (0, 1)], ask)) == [0, 1]


def said(body: dict[str, Any], ids: list[int], **change: Any) -> Answer:
    """A reply of /v1/completions, as vLLM 0.32 gives it."""
    choice = {
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "finish_reason": "stop" if ids and ids[-1] in body["stop_token_ids"] else "length",
        "prompt_token_ids": body["prompt"],
        "prompt_logprobs": [None] + [{str(token): {"logprob": -0.25}} for token in body["prompt"][1:]],
    }
    return 200, {}, json.dumps({"choices": [choice | change]}, separators=(",", ":")).encode()


def asked(sampling: Sampling, seed: int = 5) -> Request:
    return Request(Prompt(({"role": "user", "content": "3+4="},)), "think", "hard", (1, 2, 3), sampling, seed)


def speak(handle: Handle, *requests: Request) -> list[Rollout]:
    with serving(handle) as url, Client([url], width=4, patience=5.0) as client:
        sampler = RemoteSampler(client, ENCODER, speaker="teacher", vocabulary=VOCABULARY)
        finished: list[Rollout] = []
        rollouts = sampler.generate(requests, finished.append)
        assert sorted(map(id, finished)) == sorted(map(id, rollouts))
        return rollouts


def test_responses_are_asked_for_with_everything_that_decides_them() -> None:
    bodies = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        bodies.append((path, body))
        return said(body, [7, STOP])

    sampling = Sampling(9, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
    (one,) = speak(handle, asked(sampling, seed=2**63 - 1))
    ((path, body),) = bodies
    assert path == "/v1/completions" and body["prompt"] == [1, 2, 3] and body["seed"] == 2**63 - 1
    wanted = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, "min_p": 0.0}
    assert wanted.items() <= body.items() and body["stop_token_ids"] == list(ENCODER.stop_ids)
    assert (one.response_ids, one.logprobs, one.finish_reason) == ((7, STOP), (-0.5, -0.5), "stop")
    assert one.forced == (False, False) and one.speaker == "teacher"


def test_thinking_is_closed_at_the_budget_and_the_answer_goes_on() -> None:
    opened, early = ENCODER.think_open_id, ENCODER.early_stop_ids
    bodies = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        bodies.append(body)
        return said(body, [opened, 7, 7] if len(bodies) == 1 else [8, STOP])

    (one,) = speak(handle, asked(Sampling(99, thinking_budget=3)))
    assert [body["max_tokens"] for body in bodies] == [3, 99 - 3 - len(early)]
    assert bodies[1]["prompt"] == [1, 2, 3, opened, 7, 7, *early]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    assert one.response_ids == (opened, 7, 7, *early, 8, STOP) and one.finish_reason == "stop"
    assert one.forced == (False,) * 3 + (True,) * len(early) + (False,) * 2
    assert one.logprobs == (-0.5,) * 3 + (-0.25,) * len(early) + (-0.5,) * 2


def test_thinking_that_the_prompt_has_opened_is_closed_at_the_budget() -> None:
    opened, closed, early = ENCODER.think_open_id, ENCODER.think_close_id, ENCODER.early_stop_ids

    def answered(prompt: tuple[int, ...], first: list[int]) -> Rollout:
        bodies = []

        def handle(path: str, body: dict[str, Any]) -> Answer:
            bodies.append(body)
            return said(body, first if len(bodies) == 1 else [8, STOP])

        (one,) = speak(handle, replace(asked(Sampling(99, thinking_budget=3)), prompt_ids=prompt))
        return one

    cut = answered((1, 2, STOP, 3, opened), [7, 7, 7])
    assert cut.response_ids == (7, 7, 7, *early, 8, STOP)
    assert cut.forced == (False,) * 3 + (True,) * len(early) + (False,) * 2
    for prompt, first in (
        ((1, opened), [7, closed, 7]),
        ((1, opened, 7, closed), [7, 7, 7]),
        ((1, opened, STOP, 3), [7, 7, 7]),  # an earlier turn's
    ):
        assert answered(prompt, first).response_ids == (*first, 8, STOP)


def test_a_budget_that_finds_no_open_thinking_forces_nothing() -> None:
    closed, bodies = ENCODER.think_close_id, []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        bodies.append(body)
        return said(body, [ENCODER.think_open_id, closed, 7] if len(bodies) == 1 else [8, STOP])

    (one,) = speak(handle, asked(Sampling(99, thinking_budget=3)))
    assert one.response_ids == (ENCODER.think_open_id, closed, 7, 8, STOP) and not any(one.forced)


def test_forced_tokens_end_at_the_limit() -> None:
    bodies = []

    def handle(path: str, body: dict[str, Any]) -> Answer:
        bodies.append(body)
        return said(body, [ENCODER.think_open_id, 7, 7] if len(bodies) == 1 else [8])

    (one,) = speak(handle, asked(Sampling(4, thinking_budget=3)))
    assert one.response_ids == (ENCODER.think_open_id, 7, 7, ENCODER.early_stop_ids[0])
    assert one.finish_reason == "length" and one.logprobs[3:] == (-0.25,)


def test_what_a_server_breaks_off_as_it_ends_is_asked_for_again() -> None:
    reasons = iter(["abort"])
    (one,) = speak(
        lambda path, body: said(body, [7, STOP], **{"finish_reason": reason} if (reason := next(reasons, "")) else {}),
        asked(Sampling(9)),
    )
    assert one.response_ids == (7, STOP)


FALSE_REPLIES: dict[str, tuple[Handle, str]] = {
    "no ids": (lambda path, body: said(body, [7], token_ids=None), "without token ids"),
    "another prompt": (lambda path, body: said(body, [7], prompt_token_ids=[1, 1, 2, 3]), "another prompt"),
    "too many tokens": (lambda path, body: said(body, [7] * 10), "10 tokens"),
    "log-probabilities missing": (lambda path, body: said(body, [7, 7], logprobs={"token_logprobs": [-1.0]}), "1 log-"),
    "ids beyond the head": (lambda path, body: said(body, [10**6, STOP]), "holds another model"),
    "ended for no reason": (lambda path, body: said(body, [7]), "--max-model-len"),
    "ended for a reason of its own": (lambda path, body: said(body, [7], finish_reason="repetition"), "'repetition'"),
    "log-probability null": (lambda path, body: said(body, [STOP], logprobs={"token_logprobs": [None]}), "not finite"),
}


@pytest.mark.parametrize("lie", FALSE_REPLIES)
def test_a_lying_speaker_is_refused(lie: str) -> None:
    handle, sentence = FALSE_REPLIES[lie]
    with pytest.raises(DistillError, match=sentence):
        speak(handle, asked(Sampling(9)))


def test_a_penalty_across_a_budget_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="presence penalty across a thinking budget"):
        speak(lambda path, body: said(body, [STOP]), asked(Sampling(9, presence_penalty=1.0, thinking_budget=3)))
