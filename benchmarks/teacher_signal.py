"""What each signal of a teacher costs and what it loses, on stock vLLM, the same ids through every route in one run.

    python -m benchmarks.teacher_signal --json
    python -m benchmarks.teacher_signal --vocab 151936 --sequences 16

Two servers hold the same random-weight Qwen3 (256 wide, 6 layers, float32): one was started to score, the other to
generate, with the flags of ``distill teacher serve`` and the same share of the machine; only one works at a time. The
client is the one that a run uses, from rollouts to checked signals on the trainer's side:

- ``hidden``: hidden states from ``/pooling`` (``--wire``: bf16, fp32 or fp8)
- ``sampled``: the sampled token's log-probability, ``prompt_logprobs`` with k = 0
- ``topk_20``, ``topk_128``: the k most probable tokens and the tail, ``prompt_logprobs``

A round scores all sequences through each route once; the first round does not count, and figures are medians of the
others. ``tokens_per_second``: prompt and response tokens over the wall time of a pass. ``bytes_per_token``: bytes of
the replies over the same tokens. ``client_cpu_seconds``: processor time of this process in a pass.

Errors are the largest of all response tokens, against transformers in float32. ``max_logprob_error`` is of the
log-probabilities that the route knows: all of the vocabulary, the k, or one. ``max_kl_error`` is
KL(teacher || teacher over the wire) over the events that the route tells apart: every token; the k tokens and the rest;
the sampled token and the rest. It says what the wire loses, not what a smaller signal leaves out.

A route that gives hidden states leaves the teacher's head to the loss, which projects tile by tile; how long that takes
for all response tokens here is said on standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from distill.checkpoint import Checkpoint, load_model, open_checkpoint
from distill.cross_entropy import linear_logprobs
from distill.family import ModelSource
from distill.types import HiddenStates, Prompt, Request, Rollout, SampledLogprobs, Sampling, Signal, TopK
from distill.vllm.client import Client
from distill.vllm.launch import ROLES, Launch, Role
from distill.vllm.service import Service
from teachers.local import LocalTeacher
from teachers.logprobs import LogprobTeacher
from teachers.remote import RemoteTeacher
from teachers.teacher import Teacher

LARGEST_K = 128
WIDTH, NUM_LAYERS = 256, 6
LOGIT_STD = 3.0

Result = dict[str, float]


class CountingClient(Client):
    """The client of a run, counting what it is sent."""

    num_bytes = 0

    async def post(self, path: str, body: Mapping[str, Any], **more: Any) -> tuple[str, httpx.Response]:
        url, answer = await super().post(path, body, **more)
        self.num_bytes += len(answer.content)
        return url, answer


@dataclass
class Route:
    """A way to a signal, and what its passes took."""

    client: CountingClient
    teacher: Teacher
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[Signal]:
        before = self.client.num_bytes
        started, cpu_started = time.perf_counter(), time.process_time()
        signals = self.teacher.score(rollouts)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.num_bytes.append(self.client.num_bytes - before)
        return signals


def make_teacher(folder: Path, *, vocabulary: int, max_positions: int) -> Checkpoint:
    """A random Qwen3 with an untied head, and a tokenizer with a word for every id, so that entries have real sizes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float()
    # Fresh weights give logits of nearly one size, on which any wire looks exact; these spread like trained ones.
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_STD / WIDTH**0.5)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0").save_pretrained(folder)
    return open_checkpoint(ModelSource("random", "directory", str(folder)))


def make_rollouts(num: int, prompt: int, response: int, vocabulary: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    for number in range(num):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator).tolist()
        request = Request(
            Prompt(({"role": "user", "content": str(number)},)),
            "think",
            "hard",
            tuple(ids[:prompt]),
            Sampling(response),
            number,
        )
        rollouts.append(
            Rollout(request, tuple(ids[prompt:]), (False,) * response, (0.0,) * response, "length", "student")
        )
    return rollouts


def errors(rollout: Rollout, signal: Signal, exact_RV: Tensor, head_VD: Tensor) -> tuple[float, float]:
    """The largest error of a log-probability, and the largest KL between the events that the signal tells apart."""
    if isinstance(signal, HiddenStates):
        wired_RV = logprobs(signal.states_Rd, head_VD)
        return largest(exact_RV - wired_RV), largest_kl(exact_RV, wired_RV)
    if isinstance(signal, TopK):
        ids_RK, wired_RK, tail_R1 = signal.ids_RK, signal.logprobs_RK.double(), signal.tail_logprob_R.double()[:, None]
    else:
        assert isinstance(signal, SampledLogprobs)
        ids_RK, wired_RK = torch.tensor(rollout.response_ids)[:, None], signal.logprobs_R.double()[:, None]
        tail_R1 = torch.log1p(-wired_RK.exp())
    exact_RK = exact_RV.gather(-1, ids_RK)
    rest_R1 = exact_RV.scatter(-1, ids_RK, -torch.inf).logsumexp(-1, keepdim=True)
    return (
        largest(exact_RK - wired_RK),
        largest_kl(torch.cat([exact_RK, rest_R1], -1), torch.cat([wired_RK, tail_R1], -1)),
    )


def logprobs(states_Rd: Tensor, head_VD: Tensor) -> Tensor:
    # The sums over the vocabulary in float64: the divergences are as small as rounding in float32.
    return (states_Rd @ head_VD.T).double().log_softmax(-1)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def largest_kl(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum(-1).max())


def measure(args: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Result]:
    length = args.prompt_tokens + args.response_tokens
    checkpoint = make_teacher(folder / "teacher", vocabulary=args.vocab, max_positions=length + 1)
    rollouts = make_rollouts(args.sequences, args.prompt_tokens, args.response_tokens, args.vocab)
    services = {role: Service(launch(checkpoint, role, length + 1), log=folder / f"{role}.log") for role in ROLES}
    for service in services.values():
        stack.enter_context(service)
    for service in services.values():
        service.wait()

    def route(role: Role, teacher: Callable[[Client], Teacher]) -> Route:
        client = stack.enter_context(CountingClient([services[role].url], width=args.batch_tokens))
        return Route(client, teacher(client))

    cpu = torch.device("cpu")
    routes = {
        "hidden": route(
            "score", lambda client: RemoteTeacher(client, checkpoint, wire=args.wire, dtype=torch.float32, device=cpu)
        )
    }
    for name, k in (("sampled", 0), ("topk_20", 20), ("topk_128", LARGEST_K)):
        teacher = partial(LogprobTeacher, name="random", vocabulary=args.vocab, k=k, device=cpu)
        routes[name] = route("generate", teacher)
    signals: dict[str, Sequence[Signal]] = {}
    for number in range(1 + args.repeats):
        for name, one in routes.items():
            signals[name] = one.score(rollouts)
        spent = ", ".join(f"{name} {one.seconds[-1]:.1f} s" for name, one in routes.items())
        print(f"round {number}: {spent}", file=sys.stderr)

    # The reference, after the timing; the servers are idle now.
    local = LocalTeacher(load_model(checkpoint, torch.float32, cpu), name="random", batch_tokens=args.batch_tokens)
    worst = {name: [0.0, 0.0] for name in routes}
    for place, (rollout, states) in enumerate(zip(rollouts, local.score(rollouts), strict=True)):
        exact_RV = logprobs(states.states_Rd, local.head_VD)
        for name in routes:
            found = errors(rollout, signals[name][place], exact_RV, local.head_VD)
            worst[name] = [max(pair) for pair in zip(worst[name], found, strict=True)]
    tell_head_seconds(rollouts, signals["hidden"], local.head_VD)
    num_tokens = length * len(rollouts)
    return {
        name: {
            "tokens_per_second": num_tokens / statistics.median(one.seconds[1:]),
            "bytes_per_token": statistics.median(one.num_bytes[1:]) / num_tokens,
            "client_cpu_seconds": statistics.median(one.cpu_seconds[1:]),
            "max_logprob_error": worst[name][0],
            "max_kl_error": worst[name][1],
        }
        for name, one in routes.items()
    }


def launch(checkpoint: Checkpoint, role: Role, max_model_len: int) -> Launch:
    extra = ("--max-logprobs", str(LARGEST_K)) if role == "generate" else ()
    return Launch(checkpoint, role, dtype="float32", max_model_len=max_model_len, on_gpu=False, extra=extra)


def tell_head_seconds(rollouts: Sequence[Rollout], signals: Sequence[Signal], head_VD: Tensor) -> None:
    states_Nd = torch.cat([signal.states_Rd for signal in signals if isinstance(signal, HiddenStates)])
    said_N = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    started = time.perf_counter()
    linear_logprobs(states_Nd, head_VD, said_N)
    seconds = time.perf_counter() - started
    print(f"the teacher's head, of {len(said_N)} response tokens, in the loss: {seconds:.2f} s", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.teacher_signal", description=__doc__.split("\n")[0])
    arguments.add_argument("--vocab", type=int, default=512, help="vocabulary rows; 151936 is the real table")
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--prompt-tokens", type=int, default=52)
    arguments.add_argument("--response-tokens", type=int, default=96)
    arguments.add_argument("--wire", choices=["bf16", "fp32", "fp8"], default="bf16")
    arguments.add_argument("--batch-tokens", type=int, default=65536, help="most tokens under way at once")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    return arguments


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        routes = measure(args, Path(folder), stack)
    if args.json:
        print(json.dumps({"routes": routes}))
        return
    print(
        f"{'route':10} {'tokens/s':>9} {'bytes/token':>12} {'client CPU s':>13} {'log-prob error':>15} {'KL error':>9}"
    )
    for name, one in routes.items():
        print(
            f"{name:10} {one['tokens_per_second']:9,.0f} {one['bytes_per_token']:12,.0f} "
            f"{one['client_cpu_seconds']:13.2f} {one['max_logprob_error']:15.1e} {one['max_kl_error']:9.1e}"
        )


if __name__ == "__main__":
    main()
