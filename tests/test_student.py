"""What could be wrong silently in a training step: rows, masks, denominators, accumulation, precision, export."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from distill.cross_entropy import linear_cross_entropy
from distill.divergence import linear_divergence
from distill.errors import NonFiniteError
from distill.model_config import LoraSettings, StudentSettings
from distill.stage_config import Optimiser
from distill.types import Example, HiddenStates, Prompt, Request, Rollout, Sampling
from students import optimiser
from students.batch import Batch, collate, micro_batches
from students.loss import Felt, Rows
from students.optimiser import MasterAdamW
from students.rescoring import measured
from students.router import RouterLoad
from students.student import Student
from teachers.local import LocalTeacher

PLAIN = StudentSettings(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=None)
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.01}


def dense(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **changes}))


def rollout(seed: int, num_prompt: int, num_response: int, *, forced: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (num_prompt + num_response,), generator=generator).tolist()
    prompt = Prompt(({"role": "user", "content": str(seed)},))
    request = Request(prompt, "think" if seed % 2 else "no_think", "hard", tuple(ids[:num_prompt]), Sampling(99), seed)
    return Rollout(
        request=request,
        response_ids=tuple(ids[num_prompt:]),
        forced=(False,) * (num_response - forced) + (True,) * forced,
        logprobs=(-1.0,) * num_response,
        finish_reason="stop",
        speaker="student",
    )


EXAMPLES = [Example(rollout(seed, 3 + seed, 9 - seed, forced=seed % 3)) for seed in range(6)]


def cross_entropy(rows: Rows) -> Felt:
    felt = linear_cross_entropy(rows.hidden_ND, rows.head_VD, rows.batch.target_N, weights=rows.batch.weight_N)
    return Felt(felt.total, {"sampled_logprob": -felt.values})


def student(model: object, settings: StudentSettings = PLAIN, rate: float = 1e-2) -> Student:
    made = Student(model, settings, stop_ids=(48, 49))  # type: ignore[arg-type]
    made.begin(Optimiser(learning_rate=rate, warmup_steps=0))
    return made


def step(learner: Student, examples: list[Example] = EXAMPLES, at: int = 0) -> dict[str, float]:
    return learner.step(examples, cross_entropy, step=at, num_steps=10, where="a test")


def gradients(learner: Student, examples: list[Example], groups: list[list[Example]]) -> dict[str, Tensor]:
    """What a step would accumulate, without stepping."""
    total = sum(collate(group, torch.device("cpu")).num_weighted for group in groups)
    for group in groups:
        rows, _ = learner.rows(collate(group, torch.device("cpu")))
        (cross_entropy(rows).total / total).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in learner.model.named_parameters()
        if parameter.grad is not None
    }


def test_rows_and_mask_match_one_sequence_at_a_time() -> None:
    model = dense()
    learner = student(model)
    batch = collate(EXAMPLES, torch.device("cpu"))
    rows, _ = learner.rows(batch)
    expected, weights = [], []
    for example in EXAMPLES:
        said = example.rollout
        logprobs = model(torch.tensor([said.prompt_ids + said.response_ids])).logits[0].log_softmax(-1)
        first = len(said.prompt_ids) - 1
        for place, token in enumerate(said.response_ids):
            expected.append(float(logprobs[first + place, token].detach()))
            weights.append(0.0 if said.forced[place] else 1.0)
    assert cross_entropy(rows).per_token_N["sampled_logprob"].tolist() == pytest.approx(expected, abs=1e-4)
    assert batch.weight_N.tolist() == weights
    mean = -sum(value * weight for value, weight in zip(expected, weights, strict=True)) / sum(weights)
    assert step(learner)["loss"] == pytest.approx(mean, abs=1e-5)


def test_accumulated_gradients_are_those_of_one_pass() -> None:
    whole = gradients(student(dense()), EXAMPLES, [EXAMPLES])
    parts = gradients(student(dense()), EXAMPLES, micro_batches(EXAMPLES, 24))
    assert len(micro_batches(EXAMPLES, 24)) > 2
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [None, 24])
def test_a_step_is_the_same_in_one_pass_and_in_several(micro_batch_tokens: int | None) -> None:
    reference, split = student(dense()), student(dense(), replace_settings(micro_batch_tokens=micro_batch_tokens))
    for at in range(3):
        a, b = step(reference, at=at), step(split, at=at)
        for key in ("loss", "grad_norm", "think.sampled_logprob", "stop_probability"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MOE))


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("recomputed", [False, True])
def test_packed_sequences_are_those_alone(make: Callable[[], PreTrainedModel], recomputed: bool) -> None:
    """States and gradients of a packed row are those of each sequence alone, through transformers' own attention."""
    learner, plain = student(make(), replace_settings(gradient_checkpointing=recomputed)), make()
    batch = collate(EXAMPLES, torch.device("cpu"))
    assert batch.input_T.numel() == sum(batch.packing.lengths) == 66
    rows, _ = learner.rows(batch)
    expected = []
    for example in EXAMPLES:
        said = example.rollout
        states = plain.get_decoder()(torch.tensor([said.prompt_ids + said.response_ids])).last_hidden_state[0]
        expected.append(states[len(said.prompt_ids) - 1 : -1])
    torch.testing.assert_close(rows.hidden_ND, torch.cat(expected), atol=1e-5, rtol=1e-5)
    slope_ND = torch.randn(rows.hidden_ND.shape, generator=torch.Generator().manual_seed(0))
    (rows.hidden_ND * slope_ND).sum().backward()
    (torch.cat(expected) * slope_ND).sum().backward()
    pairs = zip(learner.model.named_parameters(), plain.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_a_window_is_not_silently_ignored() -> None:
    """Whoever reads a checkpoint's shape refuses it; a model that comes otherwise stops at its first pass."""
    with pytest.raises(AssertionError, match="window"):
        step(student(dense(use_sliding_window=True, sliding_window=4, max_window_layers=1)))


def test_micro_batches_fill_the_budget() -> None:
    lengths = [100, 70, 60, 40, 30, 30, 10, 300]
    examples = [Example(rollout(seed, 4, length - 3)) for seed, length in enumerate(lengths)]
    groups = micro_batches(examples, 110)
    sizes = [sum(len(one.rollout.read_ids) for one in group) for group in groups]
    assert sizes == [300, 110, 110, 90, 30]  # what is too long goes alone; the short fill up behind the long
    assert sorted(id(one) for group in groups for one in group) == sorted(map(id, examples))
    assert micro_batches(examples, None) == [examples]


def replace_settings(**changes: object) -> StudentSettings:
    return PLAIN.model_copy(update=changes)


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain = gradients(student(dense()), EXAMPLES, [EXAMPLES])
    recomputed = gradients(student(dense(), replace_settings(gradient_checkpointing=True)), EXAMPLES, [EXAMPLES])
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)


def test_stop_probability_is_the_mass_of_the_stop_ids() -> None:
    model = dense()
    learner = student(model, rate=1e-9)
    one = [Example(rollout(1, 4, 5))]
    said = one[0].rollout
    probabilities = model(torch.tensor([said.prompt_ids + said.response_ids])).logits[0, 3:8].softmax(-1)
    expected = float(probabilities[:, [48, 49]].sum(-1).mean().detach())
    assert step(learner, one)["stop_probability"] == pytest.approx(expected, rel=1e-4)


def test_bf16_student_keeps_fp32_masters() -> None:
    """At this rate an update is below bf16's rounding: without masters the weights would never move."""
    learner = student(dense().bfloat16(), replace_settings(dtype="bfloat16"), rate=1e-6)
    before = {name: value.clone() for name, value in learner.optimiser.masters.items()}  # type: ignore[union-attr]
    for at in range(3):
        step(learner, at=at)
    assert learner.optimiser is not None
    moved = [float((learner.optimiser.masters[name] - value).abs().max()) for name, value in before.items()]
    assert min(moved) > 0 and max(moved) < 1e-5
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, learner.optimiser.masters[name].bfloat16())


def test_resumed_optimiser_goes_on_exactly(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        make = lambda: student(dense().to(getattr(torch, dtype)), replace_settings(dtype=dtype))  # noqa: B023, E731
        straight = make()
        for at in range(4):
            step(straight, at=at)
        first = make()
        for at in range(2):
            step(first, at=at)
        assert first.optimiser is not None
        weights = {name: value.clone() for name, value in first.weights().items()}
        moments = {name: value.clone() for name, value in first.optimiser.state().items()}
        second = make()
        second.load_weights(weights)
        assert second.optimiser is not None
        second.optimiser.load_state(moments)
        for at in range(2, 4):
            step(second, at=at)
        for name, value in straight.weights().items():
            assert torch.equal(value, second.weights()[name]), (dtype, name)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_count_of_steps_goes_where_it_is_read(monkeypatch: pytest.MonkeyPatch, *, eight_bit: bool) -> None:
    """The meta device stands for a GPU, whose fused AdamW would read the count there."""
    monkeypatch.setattr(optimiser, "eight_bit_adamw", lambda device: optimiser._adamw)
    first, second = (torch.nn.Parameter(torch.ones(2, 2, device=device)) for device in ("cpu", "meta"))
    saved = MasterAdamW([("weight", first)], Optimiser(learning_rate=1e-3), eight_bit=eight_bit)
    first.grad = torch.ones(2, 2)
    saved.step(1e-3, where="a test")
    resumed = MasterAdamW([("weight", second)], Optimiser(learning_rate=1e-3), eight_bit=eight_bit)
    resumed.load_state(saved.state())
    step = resumed.adamw.state[second]["step"]
    assert step == 1 and type(step) is int if eight_bit else step.is_meta


def test_a_stage_begins_from_what_a_checkpoint_holds() -> None:
    """Adapters are held in fp32, and kept in the student's own bf16."""
    lora = LoraSettings(rank=4, alpha=8.0)
    unbroken, resumed = (student(dense().bfloat16(), replace_settings(dtype="bfloat16", lora=lora)) for _ in range(2))
    step(unbroken)
    resumed.load_weights(unbroken.weights())
    for one in (unbroken, resumed):
        one.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
        step(one)
    for name, parameter in unbroken.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_stage_ends_with_what_its_checkpoint_holds(tmp_path: Path) -> None:
    """What is examined and exported then is the same in a run that is resumed there."""
    lora = LoraSettings(rank=4, alpha=8.0)
    unbroken, resumed = (student(dense().bfloat16(), replace_settings(dtype="bfloat16", lora=lora)) for _ in range(2))
    for at in range(3):
        step(unbroken, at=at)
    changes = unbroken.num_changes
    unbroken.end()
    assert unbroken.num_changes > changes  # whoever samples from a copy takes a new one
    resumed.load_weights(unbroken.weights())
    for name, parameter in unbroken.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    merged, again = dict(unbroken.merged_weights()), dict(resumed.merged_weights())
    assert all(torch.equal(weight, again[name]) for name, weight in merged.items())


def test_what_is_learnt_nothing_from_is_read_without_dropout() -> None:
    learner = student(dense(), replace_settings(lora=LoraSettings(rank=4, alpha=64.0, dropout=0.5)))
    step(learner)
    once, again = (measured(learner, EXAMPLES, cross_entropy) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a["sampled_logprob"], b["sampled_logprob"])
    assert learner.model.training


def test_not_a_number_stops_before_the_step() -> None:
    learner = student(dense())
    before = {name: value.clone() for name, value in learner.weights().items()}

    def broken(rows: Rows) -> Felt:
        return Felt(cross_entropy(rows).total * float("nan"), {})

    with pytest.raises(NonFiniteError, match="the loss is nan at batch 7"):
        learner.step(EXAMPLES, broken, step=0, num_steps=1, where="batch 7")

    def infinite_gradient(rows: Rows) -> Felt:
        return Felt((rows.hidden_ND[0, 0] * 0).sqrt() + cross_entropy(rows).total, {})

    with pytest.raises(NonFiniteError, match="gradient's norm"):
        learner.step(EXAMPLES, infinite_gradient, step=0, num_steps=1, where="batch 8")
    for name, value in learner.weights().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_lora_trains_adapters_only_and_merges_on_export(tmp_path: Path) -> None:
    learner = student(dense(), replace_settings(lora=LoraSettings(rank=4, alpha=8.0)))
    assert all("lora_" in name for name in learner.weights())
    assert not learner.head_VD.requires_grad
    step(learner)
    step(learner, at=1)
    learner.export(tmp_path, learner.weights())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 7))
    torch.testing.assert_close(plain(ids).logits, learner.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(ids).logits, dense()(ids).logits, atol=1e-3)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_moe_student_feels_the_models_own_auxiliary_loss() -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MOE))
    learner = student(model)
    batch = collate(EXAMPLES, torch.device("cpu"))
    _, router = learner.rows(batch)
    assert router is not None
    sequences = [one.rollout.read_ids for one in EXAMPLES]
    width = max(map(len, sequences))
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    input_BT = torch.tensor([ids + (0,) * (width - len(ids)) for ids in sequences])
    output = model(input_BT, attention_mask=mask_BT, labels=input_BT, output_router_logits=True)
    assert float(router.loss.detach()) == pytest.approx(float(output.aux_loss.detach()), rel=1e-5)
    assert 1.0 <= router.max_load <= 4.0
    metrics = step(learner)
    assert metrics["router.aux_loss"] == pytest.approx(float(router.loss.detach()), rel=1e-5)
    routers = [name for name in learner.weights() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2


def test_teacher_that_is_the_student_has_a_divergence_of_zero() -> None:
    model = dense()
    teacher = LocalTeacher(dense(), name="twin", batch_tokens=40)
    said = [example.rollout for example in EXAMPLES]
    examples = [Example(one, signal) for one, signal in zip(said, teacher.score(said), strict=True)]
    learner = student(model)

    def reverse(rows: Rows) -> Felt:
        assert isinstance(rows.batch.signal, HiddenStates)
        felt = linear_divergence(
            rows.hidden_ND, rows.head_VD, rows.batch.signal.states_Rd, teacher.head_VD, kind="reverse_kl"
        )
        return Felt(felt.total, {"reverse_kl": felt.reverse_kl})

    metrics = learner.step(examples, reverse, step=0, num_steps=1, where="a test")
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["grad_norm"] < 1e-4


def test_teacher_scores_every_response_row_whatever_the_batch() -> None:
    model = dense(3)
    said = [example.rollout for example in EXAMPLES]
    for batch_tokens in (1, 30, 10_000):
        signals = LocalTeacher(model, name="t", batch_tokens=batch_tokens).score(said)
        for one, signal in zip(said, signals, strict=True):
            hidden = model.model(torch.tensor([one.prompt_ids + one.response_ids])).last_hidden_state[0]
            first = len(one.prompt_ids) - 1
            torch.testing.assert_close(
                signal.states_Rd, hidden[first : first + len(one.response_ids)], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("tied", [True, False])
def test_export_of_the_real_06b_shape_loads_with_plain_transformers(tmp_path: Path, tied: bool) -> None:
    """The published 0.6B configuration with its whole vocabulary, cut to two layers, random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )
    learner = student(
        Qwen3ForCausalLM(config).bfloat16(), replace_settings(dtype="bfloat16", gradient_checkpointing=True)
    )
    before = learner.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    examples = [replace(example) for example in EXAMPLES[:2]]
    assert step(learner, examples)["loss"] == pytest.approx(11.93, abs=0.5)  # log(151,936): nothing is known yet
    learner.export(tmp_path, learner.weights())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.vocab_size == 151_936
    for (name, ours), (other, theirs) in zip(learner.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
    assert not torch.equal(before, loaded.model.layers[0].mlp.up_proj.weight)


# Reading ahead of the judgement


def hidden_examples(teacher: LocalTeacher, rollouts: list[Rollout]) -> list[Example]:
    return [Example(said, states) for said, states in zip(rollouts, teacher.score(rollouts), strict=True)]


def watched_passes(learner: Student) -> list[int]:
    """The tokens of each forward pass that the learner is going to make."""
    rows, passes = learner.rows, list[int]()

    def watched(batch: Batch) -> tuple[Rows, RouterLoad | None]:
        passes.append(len(batch.input_T))
        return rows(batch)

    learner.rows = watched  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (dense, PLAIN),
        (moe, PLAIN),
        (dense, PLAIN.model_copy(update={"micro_batch_tokens": 24})),
        (dense, PLAIN.model_copy(update={"gradient_checkpointing": True})),
        (dense, PLAIN.model_copy(update={"lora": LoraSettings(rank=4, alpha=8, dropout=0.3)})),
    ],
    ids=["plain", "moe", "micro-batches", "checkpointing", "dropout"],
)
def test_what_was_read_ahead_changes_no_bit(shape: Callable[[], PreTrainedModel], settings: StudentSettings) -> None:
    found = []
    for ahead in (False, True):
        learner = student(shape(), settings)
        passes = watched_passes(learner)
        metrics = []
        for at in range(3):
            torch.manual_seed(at)
            if ahead:
                assert learner.read([example.rollout for example in EXAMPLES]) is not None
            metrics.append({name: value for name, value in step(learner, at=at).items() if "seconds" not in name})
        found.append((metrics, {name: value.clone() for name, value in learner.weights().items()}, passes))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]  # as many passes, in the same order
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_signals_that_come_after_the_reading_are_felt() -> None:
    teacher = LocalTeacher(dense(seed=1), name="teacher", batch_tokens=1000)
    examples = hidden_examples(teacher, [example.rollout for example in EXAMPLES])

    def loss(rows: Rows) -> Felt:
        assert isinstance(rows.batch.signal, HiddenStates)
        felt = linear_divergence(
            rows.hidden_ND,
            rows.head_VD,
            rows.batch.signal.states_Rd,
            teacher.head_VD,
            weights=rows.batch.weight_N,
            kind="reverse_kl",
        )
        return Felt(felt.total, {"reverse_kl": felt.reverse_kl})

    kls = []
    for ahead in (False, True):
        learner = student(dense())
        if ahead:
            learner.read([example.rollout for example in examples])
        kls.append(learner.step(examples, loss, step=0, num_steps=1, where="a test")["reverse_kl"])
    assert kls[0] == kls[1] > 0


def test_what_was_read_for_something_else_is_not_taken() -> None:
    """Other responses, other weights, another stage."""
    others = [Example(rollout(seed, 4, 5)) for seed in range(3)]
    reference, learner = student(dense()), student(dense())
    learner.read([example.rollout for example in EXAMPLES])
    for at in range(2):
        assert step(reference, others, at)["loss"] == step(learner, others, at)["loss"]
    learner.read([example.rollout for example in EXAMPLES])
    for one in (reference, learner):
        one.load_weights({name: 0.5 * value for name, value in one.weights().items()})
    assert step(reference)["loss"] == step(learner)["loss"]
    learner.read([example.rollout for example in EXAMPLES])
    for one in (reference, learner):
        one.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    assert step(reference)["loss"] == step(learner)["loss"]


def test_one_of_several_processes_reads_nothing_ahead() -> None:
    learner = student(dense())
    learner.engine = "replicated"
    assert learner.read([example.rollout for example in EXAMPLES]) is None


def test_a_step_counts_the_seconds_of_its_reading() -> None:
    learner = student(dense())
    rows = learner.rows
    learner.rows = lambda batch: time.sleep(0.2) or rows(batch)  # type: ignore
    span = learner.read([example.rollout for example in EXAMPLES])
    assert span is not None and 0.2 <= span[1] - span[0] < 0.4
    learner.rows = rows  # type: ignore[method-assign]
    assert 0.2 <= step(learner)["seconds.train"] < 0.4
    assert step(learner)["seconds.train"] < 0.2


def test_the_loss_is_handed_on_as_it_is() -> None:
    """A total that is divided or multiplied on its way would have the head's gradient copied, [V, d] a micro-batch."""
    learner, handed = student(dense(), replace_settings(micro_batch_tokens=20)), []

    def loss(rows: Rows) -> Felt:
        felt = cross_entropy(rows)
        felt.total.register_hook(lambda gradient: handed.append(float(gradient)))
        return felt

    learner.step(EXAMPLES, loss, step=0, num_steps=10, where="a test")
    assert len(handed) > 1 and set(handed) == {1.0}
