"""How fast a served teacher speaks: ``python -m benchmarks.teacher_generation --json``.

Starts a vLLM server with the embedded teacher and asks for short responses in both modes, ``--width`` of them at once,
``--repeats`` times after one round that counts for nothing. Short responses of a small model are what the client and
the server's front end are slowest at: a flagship's responses take minutes, and then neither matters. Standard output is
one JSON document; ``steps`` are the engine's passes over the model, of which few mean that many responses grew at once.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from distill.checkpoint import load_tokenizer, open_checkpoint
from distill.encode import Encoder
from distill.family import resolve
from distill.types import MODES, Prompt, Request, Sampling
from distill.vllm.client import Client
from distill.vllm.launch import Launch
from distill.vllm.remote_sampler import RemoteSampler
from distill.vllm.service import Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line instead of an indented document")
    arguments = parser.parse_args()
    rounds = measure(arguments.responses, arguments.width, arguments.repeats)
    result = {
        "tokens_per_second": statistics.median(one["tokens"] / one["seconds"] for one in rounds),
        "responses_per_second": statistics.median(arguments.responses / one["seconds"] for one in rounds),
        "client_cpu_seconds": statistics.median(one["client_cpu_seconds"] for one in rounds),
        "steps": statistics.median(one["steps"] for one in rounds),
        "rounds": rounds,
    }
    print(json.dumps(result, indent=None if arguments.json else 1))


def measure(num_responses: int, width: int, num_repeats: int) -> list[dict[str, float]]:
    teacher = open_checkpoint(resolve("tiny", role="teacher"))
    encoder = Encoder(load_tokenizer(teacher))
    launch = Launch(teacher, "generate", dtype="float32", max_model_len=256, on_gpu=False)
    rounds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Service(launch, log=Path(folder) / "log") as service,
    ):
        service.wait()
        with Client([service.url], width=width) as client:
            sampler = RemoteSampler(client, encoder, speaker="teacher", vocabulary=teacher.shape.vocabulary)
            for number in range(num_repeats + 1):
                requests = [_request(encoder, number * num_responses + place) for place in range(num_responses)]
                steps, cpu, started = _steps(service.url), _cpu_seconds(), time.perf_counter()
                rollouts = sampler.generate(requests)
                rounds.append(
                    {
                        "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
                        "seconds": time.perf_counter() - started,
                        "client_cpu_seconds": _cpu_seconds() - cpu,
                        "steps": _steps(service.url) - steps,
                    }
                )
    return rounds[1:]


def _request(encoder: Encoder, seed: int) -> Request:
    question = Prompt(({"role": "user", "content": f"{seed % 10}+4*{seed % 7}-2*3+1="},))
    return encoder.request(question, mode=MODES[seed % 2], sampling=Sampling(96), seed=seed)


def _steps(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = re.search(r"^vllm:iteration_tokens_total_count\S* (\S+)$", text, re.MULTILINE)
    assert found is not None, "vLLM does not say how many steps it took"
    return float(found[1])


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
