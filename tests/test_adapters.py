"""LoRA adapters: which ones a student can have, how many parameters they train, and that all of them are exported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.adapters import adapter_parameters
from distill.divergence import linear_cross_entropy
from distill.errors import UserError
from distill.family import Shape
from distill.model_config import LoraSettings, StudentSettings
from distill.stage_config import Optimiser
from distill.types import Example, Prompt, Request, Rollout, Sampling
from students.batch import collate
from students.student import Felt, Rows, Student, _with_lora

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
    _with_lora(model, lora)
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
