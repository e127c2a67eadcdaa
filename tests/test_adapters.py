"""LoRA adapters: which ones a student can have, how many parameters they train, and that all of them are exported."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_memory import tensor_peak
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.machine import random_model
from distill.adapters import adapter_parameters
from distill.config import RunConfig
from distill.cross_entropy import linear_cross_entropy
from distill.errors import UserError
from distill.family import SIZES, Shape, shape_of
from distill.memory import hold_student, student_memory
from distill.model_config import LoraSettings, StudentSettings, TeacherSettings
from distill.stage_config import Optimiser
from distill.types import Example, Prompt, Request, Rollout, Sampling
from pipelines.pace import trained_parameters
from students.adapter import with_lora
from students.batch import collate
from students.loss import Felt, Rows
from students.student import Student

WIDTHS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.01}

ALLOWED = [
    ("dense", "all-linear"),
    ("tied", "all-linear"),
    ("tied", ("q_proj", "self_attn.k_proj")),
    ("dense", ("v_proj", "model.layers.1.mlp.up_proj", "0.mlp.gate_proj")),
    ("dense", ("o_proj", "down_proj")),
    ("dense", ("embed_tokens",)),
    ("dense", ("model.embed_tokens", "up_proj")),
    ("moe", "all-linear"),
    ("moe", ("q_proj", "1.self_attn.o_proj")),
    ("moe", ("gate",)),
    ("moe", ("mlp.gate", "down_proj")),
    ("moe", ("gate_proj", "experts.up_proj")),
    ("moe", ("embed_tokens", "k_proj", "gate_proj", "up_proj")),
]


def model_of(kind: str) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    if kind == "moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDTHS, **MOE, tie_word_embeddings=False))
    return Qwen3ForCausalLM(Qwen3Config(**WIDTHS, tie_word_embeddings=kind == "tied"))


def rollout(seed: int) -> Rollout:
    ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    request = Request(Prompt(({"role": "user", "content": "?"},)), "think", "hard", tuple(ids[:4]), Sampling(99), seed)
    return Rollout(request, tuple(ids[4:]), (False,) * 8, (-1.0,) * 8, "stop", "student")


EXAMPLES = [Example(rollout(seed)) for seed in range(4)]


def cross_entropy(rows: Rows) -> Felt:
    felt = linear_cross_entropy(rows.hidden_ND, rows.head_VD, rows.batch.target_N, weights=rows.batch.weight_N)
    return Felt(felt.total, {"sampled_logprob": -felt.values})


def trained(kind: str, targets: tuple[str, ...] | str, dtype: str = "float32") -> Student:
    """A student of random weights after three large steps."""
    lora = LoraSettings(rank=4, alpha=16.0, target_modules=targets)  # type: ignore[arg-type]
    settings = StudentSettings(dtype=dtype, gradient_checkpointing=False, micro_batch_tokens=None, lora=lora)  # type: ignore[arg-type]
    learner = Student(model_of(kind).to(getattr(torch, dtype)), settings, stop_ids=(48, 49))
    learner.begin(Optimiser(learning_rate=3e-2, warmup_steps=0))
    for at in range(3):
        learner.step(EXAMPLES, cross_entropy, step=at, num_steps=3, where="a test")
    return learner


def logprobs_as_trained(learner: Student) -> Tensor:
    with torch.no_grad():
        rows, _ = learner.rows(collate(EXAMPLES, torch.device("cpu")))
        return (rows.hidden_ND @ rows.head_VD.T).log_softmax(-1)


def logprobs_of(model: nn.Module) -> Tensor:
    found = []
    with torch.no_grad():
        for said in (example.rollout for example in EXAMPLES):
            logits_TV = model(torch.tensor([said.prompt_ids + said.response_ids])).logits[0]
            found.append(logits_TV[len(said.prompt_ids) - 1 : -1].log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize(("kind", "targets"), ALLOWED)
def test_what_was_trained_is_what_is_exported(kind: str, targets: tuple[str, ...] | str, tmp_path: Path) -> None:
    learner = trained(kind, targets)
    for name, value in learner.weights().items():
        assert "_B" not in name or value.any(), f"{name} has learnt nothing"
    learner.export(tmp_path, learner.weights())
    plain = logprobs_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(plain, logprobs_as_trained(learner), atol=1e-4, rtol=1e-4)
    assert (plain - logprobs_of(model_of(kind).eval())).abs().max() > 0.1


def number_trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


@pytest.mark.parametrize(("kind", "targets"), ALLOWED)
def test_the_count_is_pefts_own(kind: str, targets: tuple[str, ...] | str) -> None:
    model = model_of(kind)
    lora = LoraSettings(rank=3, target_modules=targets)  # type: ignore[arg-type]
    with_lora(model, lora)
    shape = Shape.from_config(model.config.to_dict())
    assert adapter_parameters(shape, lora) == number_trained(model.parameters())


@pytest.mark.parametrize(
    ("kind", "targets", "dropout", "sentence"),
    [
        ("dense", ("q_porj",), 0.0, r"has 'q_porj', and nothing .*; did you mean q_proj\? name some of embed_tokens, "),
        ("dense", ("q_proj", "lm_head"), 0.0, "has lm_head, the student's head"),
        ("tied", ("q_proj", "lm_head"), 0.0, "has lm_head, the student's head"),
        ("tied", ("q_proj", "embed_tokens"), 0.0, "has embed_tokens, and this student's embedding is its head too"),
        ("tied", ("model.embed_tokens",), 0.0, "has model.embed_tokens, and this student's embedding is its head too"),
        ("dense", ("mlp",), 0.0, "has 'mlp', and nothing"),
        ("dense", ("proj",), 0.0, "has 'proj', and nothing"),
        ("dense", ("2.mlp.up_proj",), 0.0, "has '2.mlp.up_proj', and nothing"),
        ("dense", ("gate",), 0.0, "has 'gate', and nothing .* did you mean gate_proj"),
        ("dense", (), 0.0, "is empty; name some of embed_tokens, q_proj, "),
        ("dense", ("all-linear",), 0.0, "or set it to all-linear"),
        ("moe", ("gate_up_proj",), 0.0, "has 'gate_up_proj', and nothing"),
        ("moe", ("gate_proj",), 0.0, "has gate_proj without up_proj, .*; name both"),
        ("moe", ("1.mlp.gate",), 0.0, "has 1.mlp.gate, of one layer, .*; write gate"),
        ("moe", ("q_proj", "down_proj"), 0.1, r"dropout is 0.1, .*; set it to 0, or student.lora.target_modules to"),
    ],
)
def test_what_cannot_be_adapted_is_refused(kind: str, targets: tuple[str, ...], dropout: float, sentence: str) -> None:
    settings = StudentSettings(dtype="float32", lora=LoraSettings(target_modules=targets, dropout=dropout))
    with pytest.raises(UserError, match=sentence):
        Student(model_of(kind), settings, stop_ids=(48, 49))


def config_of(shape: Shape) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.mlp_width,
        tie_word_embeddings=shape.tied,
    )


@pytest.mark.parametrize("name", ["nano-moe", "30B-A3B"])
def test_a_mixtures_experts_and_router_count_in_the_memory_formula(name: str) -> None:
    """By peft's own count; of 30B-A3B at rank 64 they are nearly all that is trained."""
    shape = shape_of(name)
    assert shape is not None
    lora = LoraSettings(rank=64)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config_of(shape))
        with_lora(model, lora)
    number = number_trained(model.parameters())
    assert adapter_parameters(shape, lora) == number
    config = RunConfig(
        teacher=TeacherSettings(model="32B", backend="vllm"), student=StudentSettings(model=name, lora=lora)
    )
    assert trained_parameters(shape, config) == number
    parts = student_memory(config, shape, SIZES["32B"], processes=8, engine="replicated").parts
    assert [parts[key] / number for key in ("masters", "moments", "gradients", "buckets")] == [4, 8, 6, 2]
    if name == "30B-A3B":
        assert number == 3_986_030_592
        held = hold_student(config, shape, SIZES["32B"])
        assert (held.engine, held.fits) == ("replicated", False)


def test_adapters_of_experts_hold_a_copy_of_them_for_the_backward_pass() -> None:
    """What they add to a step's peak, by torch's own count, beside adapters of rank 1 and their gradients."""
    shape = Shape(4, 4, 2, 16, 64, 96, 1000, tied=False, num_experts=64, experts_per_token=2)

    def found(targets: tuple[str, ...] | str, is_checkpointed: bool) -> tuple[int, int]:
        lora = LoraSettings(rank=1, target_modules=targets)  # type: ignore[arg-type]
        settings = StudentSettings(dtype="float32", gradient_checkpointing=is_checkpointed, lora=lora)
        learner = Student(Qwen3MoeForCausalLM(config_of(shape)), settings, stop_ids=(48, 49))
        learner.begin(Optimiser(learning_rate=1e-5, warmup_steps=0))

        def step() -> None:
            learner.step(EXAMPLES, cross_entropy, step=0, num_steps=3, where="a test")

        step()
        config = RunConfig(teacher=TeacherSettings(model="32B", backend="vllm"), student=settings)
        return tensor_peak(step), student_memory(config, shape, SIZES["32B"]).parts["experts"]

    for is_checkpointed in (True, False):
        base, expected = found(("q_proj", "gate"), is_checkpointed)
        assert expected == 0
        for targets in (("down_proj",), ("gate_proj", "up_proj")):
            peak, expected = found(targets, is_checkpointed)
            assert 0.5 < (peak - base) / expected < 1.1, (targets, is_checkpointed)
        peak, expected = found("all-linear", is_checkpointed)
        assert expected == pytest.approx(peak - base, rel=0.1), is_checkpointed


@pytest.mark.parametrize(("kind", "targets"), ALLOWED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_that_peft_merges(kind: str, targets: tuple[str, ...] | str, dtype: str) -> None:
    """Every tensor by its name and to the bit: a server is sent what an export holds."""
    learner = trained(kind, targets, dtype)
    merged = dict(learner.merged_weights())
    expected = dict(deepcopy(learner.adapted).merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(merged[name], value.to(learner.dtype)), name


@pytest.mark.parametrize(("kind", "targets"), ALLOWED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_what_peft_makes_of_a_copy(
    kind: str, targets: tuple[str, ...] | str, dtype: str, tmp_path: Path
) -> None:
    learner = trained(kind, targets, dtype)
    learner.export(tmp_path / "ours", learner.weights())
    deepcopy(learner.adapted).merge_and_unload().save_pretrained(tmp_path / "pefts")
    ours, pefts = ({file.name: file.read_bytes() for file in (tmp_path / one).iterdir()} for one in ("ours", "pefts"))
    assert ours == pefts


def test_an_export_copies_only_what_adapters_change(tmp_path: Path) -> None:
    shape = Shape(2, 4, 2, 16, 64, 96, 20_000, tied=True)
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False, lora=LoraSettings(rank=1))
    learner = Student(random_model(shape, seed=0), settings, stop_ids=(48, 49))
    weights = learner.weights()
    adapted_bytes = 4 * (shape.total_parameters - shape.vocabulary * shape.width)
    peak = tensor_peak(lambda: learner.export(tmp_path, weights))
    assert peak < 1.5 * adapted_bytes < 0.2 * 4 * shape.total_parameters, peak
