"""The family table against the published parameter counts, and what a short name means."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.costs import Cost, CostAccount, sequence_flops
from distill.errors import UserError
from distill.family import SIZES, Shape, resolve

TOTAL = {  # billions, from the published checkpoints
    "0.6B": 0.596049920,
    "1.7B": 1.720574976,
    "4B": 4.022468096,
    "8B": 8.190735360,
    "14B": 14.768307200,
    "32B": 32.762123264,
    "30B-A3B": 30.532122624,
    "235B-A22B": 235.093634560,
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_exact(size: str) -> None:
    assert SIZES[size].total_parameters == round(TOTAL[size] * 1e9)


@pytest.mark.parametrize("moe", [False, True])
def test_shape_of_a_real_model_counts_its_parameters(moe: bool) -> None:
    shape = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    if moe:
        config = Qwen3MoeConfig(
            **shape, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
        model = Qwen3MoeForCausalLM(config)
    else:
        config = Qwen3Config(**shape, num_key_value_heads=2, intermediate_size=40, tie_word_embeddings=True)
        model = Qwen3ForCausalLM(config)
    found = Shape.from_config(config.to_dict())
    assert found.total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_names() -> None:
    assert resolve("235B", role="teacher").location == "Qwen/Qwen3-235B-A22B"
    assert resolve("32B", role="teacher").location == "Qwen/Qwen3-32B"
    assert resolve("4B", role="student").location == "Qwen/Qwen3-4B-Base"
    assert resolve("me/mine", role="student", revision="abc").revision == "abc"
    assert resolve("nano", role="student").kind == "embedded"


@pytest.mark.parametrize(
    ("name", "role", "sentence"),
    [
        ("6B", "student", "nearest: 0.6B"),
        ("nanno", "student", "nearest: nano"),
        ("32B", "student", "no base checkpoint"),
        ("./gone", "teacher", "no size, embedded model, folder or hub id"),
    ],
)
def test_unknown_names_show_the_nearest(name: str, role: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(name, role=role)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^CHECKPOINT 'nanno' is no size"):
        resolve("nanno", role="teacher", option="CHECKPOINT")


def test_flops_of_a_sequence_by_hand() -> None:
    shape = SIZES["0.6B"]
    per_context = 4 * 28 * 16 * 128
    matmul = 2 * 595_984_384
    expected = 10 * (matmul + per_context * 5) + 20 * (matmul + per_context * 20)  # contexts P/2 and P + R/2
    assert sequence_flops(shape, 10, 20) == pytest.approx(expected)


def test_account_survives_its_json() -> None:
    account = CostAccount()
    account.charge("student_train", "a", Cost(tokens=3, flops=5.0, seconds=2.0))
    account.charge("student_train", "b", Cost(tokens=1, flops=1.0, seconds=1.0, reused_tokens=4))
    account.charge("evaluate", "a", Cost(tokens=9, flops=9.0))
    shown = account.to_json()
    assert shown["student_train"]["tokens"] == 4 and shown["student_train"]["tokens_per_second"] == pytest.approx(4 / 3)
    assert CostAccount.from_json(shown) == account == CostAccount.from_state(account.state())
    assert account.of_stage("a") == {"student_train": Cost(tokens=3, flops=5.0, seconds=2.0)}
