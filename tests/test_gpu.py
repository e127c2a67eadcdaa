"""What only a GPU can show: its kernels, captured passes and engines. Collected where there is one (conftest.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from test_divergence import GROUPS, gradients, naive
from test_sampler import endless, model, request
from test_student import EXAMPLES, MOE, SHAPE, cross_entropy, dense
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill import replay
from distill.attention import PACKED, Packing
from distill.divergence import KINDS, linear_divergence
from distill.model_config import StudentSettings
from distill.stage_config import Optimiser
from students.rescoring import rescore
from students.student import Student

__all__ = ["model"]  # a fixture
GPU = torch.device("cuda")
PUBLISHED = {"vocab_size": 151_936, "hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8}


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().norm().cpu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("merged_ids", [(), GROUPS])
def test_the_divergence_at_the_published_vocabulary(
    kind: str, dtype: torch.dtype, tolerance: float, merged_ids: tuple[tuple[int, ...], ...]
) -> None:
    """Against float64 on the very inputs; several tiles, temperature, weights."""
    torch.manual_seed(0)
    shapes = (40, 256), (151_936, 256), (40, 384), (151_936, 384)
    # Logits of standard deviation 3.
    scales = 1.0, 3 * 256**-0.5, 1.0, 3 * 384**-0.5
    inputs = [(scale * torch.randn(shape, device=GPU)).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]
    inputs = [x.requires_grad_(i < 2) for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    weights = torch.linspace(0, 2, 40, device=GPU)
    sampled_ids = torch.arange(40, device=GPU) * 997
    options: dict[str, Any] = {"kind": kind, "beta": 0.3, "temperature": 0.8, "merged_ids": merged_ids}
    ours = linear_divergence(*inputs, **options, weights=weights, sampled_ids=sampled_ids, chunk_rows=16)
    spec = naive(*exact, **options, weights=weights.double(), sampled_ids=sampled_ids)
    for name, expected in spec.items():
        assert relative(getattr(ours, name).detach(), expected.detach()) <= tolerance, name
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert relative(mine, theirs) <= tolerance


def published(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = {**SHAPE, **PUBLISHED, "head_dim": 128, "initializer_range": 0.05, **changes}
    return Qwen3ForCausalLM(Qwen3Config(**shape)).to(GPU)


def test_packed_attention_in_16_bits_is_that_of_single_sequences() -> None:
    """PyTorch's FlashAttention over a packed row, heads shared, against float32, one sequence at a time."""
    lengths, ids = (3, 130, 1, 77), torch.randint(0, 151_936, (1, 211), device=GPU)
    whole, half = published().train(), published().to(torch.bfloat16).train()
    whole.set_attn_implementation(PACKED)
    half.set_attn_implementation(PACKED)
    packing = Packing.of(lengths, GPU)
    places = torch.cat([torch.arange(length) for length in lengths])[None].to(GPU)
    packed = half.get_decoder()(input_ids=ids, position_ids=places, use_cache=False, **packing.keywords())[0][0]
    apart = torch.cat(
        [whole.get_decoder()(input_ids=part, use_cache=False)[0][0] for part in ids.split(lengths, dim=1)]
    )
    assert relative(packed.detach(), apart.detach()) < 2e-2
    packed.float().pow(3).sum().backward()
    apart.pow(3).sum().backward()
    for name, parameter in whole.get_decoder().layers.named_parameters():
        found = half.get_decoder().layers.get_parameter(name).grad
        assert found is not None and parameter.grad is not None
        assert relative(found, parameter.grad) < 6e-2, name


@pytest.fixture
def num_captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    original = replay._cuda_capture

    def counting() -> replay.Capture:
        capture = original()

        def counted_capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
            counted.append(1)
            return capture(work)

        return counted_capture

    monkeypatch.setattr(replay, "_cuda_capture", counting)
    return counted


def test_replayed_passes_say_what_passes_say(
    model: Qwen3ForCausalLM, num_captured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(seed, length=3 + seed % 7, max_new_tokens=60 + seed) for seed in range(40)]
    try:
        model.to(GPU)
        replayed = endless(model, 16).generate(requests)
        assert num_captured
        monkeypatch.setattr("distill.sampler.replays", lambda *arguments: None)
        plain = endless(model, 16).generate(requests)
    finally:
        model.cpu()
    assert [one.response_ids for one in replayed] == [one.response_ids for one in plain]
    for mine, theirs in zip(replayed, plain, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert [one.response_ids for one in replayed] == [one.response_ids for one in endless(model, 16).generate(requests)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_the_sampler_speaks_with_the_weights_of_now(num_captured: list[int], dtype: str, tolerance: float) -> None:
    learner = Student(
        published().to(getattr(torch, dtype)),
        StudentSettings(dtype=dtype, gradient_checkpointing=False),  # type: ignore[arg-type]
        stop_ids=(48, 49),
    )
    learner.begin(Optimiser(learning_rate=1e-3, warmup_steps=0))
    for number in range(3):
        said = endless(learner.model, 16).generate([request(seed, max_new_tokens=100) for seed in range(24)])  # type: ignore[arg-type]
        for rollout, scored in zip(said, rescore(learner, said), strict=True):
            assert (torch.tensor(rollout.logprobs) - scored.token_R.cpu()).abs().max() <= tolerance
        learner.step(EXAMPLES, cross_entropy, step=number, num_steps=3, where="a test")
    assert num_captured


def curve(settings: StudentSettings, device: torch.device, **changes: Any) -> list[float]:
    made = dense(**changes).to(device=device, dtype=getattr(torch, settings.dtype))
    return losses(Student(made, settings, stop_ids=(48, 49)))


def losses(learner: Student) -> list[float]:
    learner.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    return [
        learner.step(EXAMPLES, cross_entropy, step=number, num_steps=6, where="a test")["loss"] for number in range(6)
    ]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The curve on the CPU, in fp32."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return curve(StudentSettings(dtype="float32"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-3),
        ({"dtype": "float32", "gradient_checkpointing": False, "micro_batch_tokens": 20}, 1e-3),
        ({"dtype": "bfloat16"}, 3e-2),
        ({"dtype": "bfloat16", "adamw": "8bit"}, 6e-2),
    ],
)
def test_a_student_learns_as_on_a_cpu(reference: list[float], changes: dict[str, Any], tolerance: float) -> None:
    assert curve(StudentSettings(**changes), GPU) == pytest.approx(reference, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_optimiser_goes_on(dtype: Literal["float32", "bfloat16"]) -> None:
    settings = StudentSettings(dtype=dtype)
    straight, resumed = (
        Student(dense().to(device=GPU, dtype=getattr(torch, dtype)), settings, stop_ids=(48, 49)) for _ in range(2)
    )
    whole = losses(straight)
    resumed.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    for number in range(3):
        resumed.step(EXAMPLES, cross_entropy, step=number, num_steps=6, where="a test")
    assert resumed.optimiser is not None
    weights, moments = resumed.weights(), resumed.optimiser.state()
    # As they come out of a file.
    weights, moments = ({name: value.cpu().clone() for name, value in part.items()} for part in (weights, moments))
    resumed.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    resumed.load_weights(weights)
    resumed.optimiser.load_state(moments)
    for number in range(3, 6):
        metrics = resumed.step(EXAMPLES, cross_entropy, step=number, num_steps=6, where="a test")
        assert metrics["loss"] == pytest.approx(whole[number], rel=1e-3)


def sharded_curve(rank: int, folder: str, offload: bool) -> None:
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=1)
    settings = StudentSettings(dtype="bfloat16", cpu_offload=offload, micro_batch_tokens=20)
    learner = Student(dense(), settings, stop_ids=(48, 49), engine="sharded")
    found = losses(learner)
    with learner.whole():
        said = endless(learner.model, 4).generate([request(seed) for seed in range(6)])  # type: ignore[arg-type]
    Path(folder, "found.json").write_text(json.dumps([found, [one.response_ids for one in said]]))
    dist.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True])
def test_a_sharded_student_learns_so_too(reference: list[float], tmp_path: Path, offload: bool) -> None:
    """FSDP2 over NCCL, of one process: its gathering, its precision and its slices in the machine's memory."""
    torch.multiprocessing.spawn(sharded_curve, (str(tmp_path), offload), nprocs=1)  # type: ignore[attr-defined]
    found, said = json.loads((tmp_path / "found.json").read_text())
    assert found == pytest.approx(reference, rel=3e-2) and len(said) == 6


def test_a_mixture_of_experts_is_sampled_and_trained(num_captured: list[int]) -> None:
    torch.manual_seed(0)
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MOE)).to(GPU)
    learner = Student(made, StudentSettings(dtype="float32"), stop_ids=(48, 49))
    said = endless(made, 8).generate([request(seed, max_new_tokens=20) for seed in range(12)])  # type: ignore[arg-type]
    for rollout, scored in zip(said, rescore(learner, said), strict=True):
        assert (torch.tensor(rollout.logprobs) - scored.token_R.cpu()).abs().max() <= 1e-4
    found = losses(learner)
    assert found[-1] < found[0] and not num_captured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run(tmp_path: Path, dtype: str) -> None:
    words = [
        *("stages.off_policy.num_prompts=256", "stages.off_policy.batch_size=16", "stages.on_policy.steps=10"),
        *("stages.on_policy.prompts_per_step=16", "evaluation.num_questions=32", f"student.dtype={dtype}"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "run", "--json", "--out", str(tmp_path / "run")]
        + [word for key in words for word in ("--set", key)],
        env={**os.environ, "DISTILL_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 32 + 10
    off_policy = [line["loss"] for line in lines if line["stage"] == "off_policy"]
    assert sum(off_policy[-4:]) < sum(off_policy[:4])
