"""TRL's GRPO loss and gradients on tensors that the tests know: ``python -m benchmarks.policy_gradient``.

Needs the extra `bench` (TRL). A real ``GRPOTrainer`` around a real, very small Qwen3 computes the loss of each case and
its gradient; the printed JSON is what ``tests/test_policy_gradient.py`` has pinned, and compares with the project's own
loss without TRL. The weights and inputs are made of sines, the same with every version of every library.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
NUM_RESPONSES, NUM_PROMPT, NUM_RESPONSE = 4, 3, 5
LIMIT = 8
"""Most tokens of a response, Dr. GRPO's denominator."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is switched on. ``dr_grpo`` divides by a constant; ``old`` compares with log-probs of another policy;
    ``sampler`` corrects for a sampler that is not the trainer."""

    dr_grpo: bool = False
    old: bool = False
    sampler: bool = False


CASES = {
    "first_step": Case(),
    "clipped": Case(old=True),
    "dr_grpo": Case(dr_grpo=True, old=True),
    "importance": Case(old=True, sampler=True),
}
CLIP_LOW, CLIP_HIGH, IMPORTANCE_CAP = 0.2, 0.28, 1.5
REWARDS = (1.0, 0.0, 0.0, 0.6)


def wave(*shape: int, step: float, scale: float) -> Tensor:
    """Numbers between -scale and scale that no random generator had a part in."""
    count = int(torch.tensor(shape).prod())
    return (scale * torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64))).float().reshape(shape)


def model() -> Qwen3ForCausalLM:
    made = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(made.named_parameters())):
            if "norm" not in name:
                parameter.copy_(wave(*parameter.shape, step=0.7 + 0.01 * number, scale=0.6))
    return made


def inputs() -> dict[str, Tensor]:
    """Prompts of equal length, responses with padding behind them, and log-probs of the old policy and the sampler."""
    lengths = torch.tensor([5, 3, 4, 5])
    ids = (torch.arange(NUM_RESPONSES * (NUM_PROMPT + NUM_RESPONSE)) * 7 % SHAPE["vocab_size"]).reshape(
        NUM_RESPONSES, -1
    )
    mask = (torch.arange(NUM_RESPONSE) < lengths[:, None]).long()
    return {
        "prompt_ids": ids[:, :NUM_PROMPT],
        "completion_ids": ids[:, NUM_PROMPT:],
        "completion_mask": mask,
        # Differences of up to 0.5 and 0.6 in the logarithm: on both sides of both clips, and of the cap.
        "old_difference": wave(NUM_RESPONSES, NUM_RESPONSE, step=1.3, scale=0.5),
        "sampler_difference": wave(NUM_RESPONSES, NUM_RESPONSE, step=2.1, scale=0.6),
    }


def logprobs(made: Qwen3ForCausalLM, given: dict[str, Tensor]) -> Tensor:
    """The model's log-probabilities of the responses, [responses, tokens]."""
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1)
    with torch.no_grad():
        rows = made(ids).logits[:, NUM_PROMPT - 1 : -1].log_softmax(-1)
    return rows.gather(-1, given["completion_ids"][..., None])[..., 0]


def fingerprint(loss: Tensor, made: Qwen3ForCausalLM) -> dict[str, float]:
    """The loss and what of its gradient a wrong one would not share: three norms and three entries."""
    gradients = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    head, layer = gradients["lm_head.weight"], gradients["model.layers.0.mlp.up_proj.weight"]
    return {
        "loss": float(loss),
        "head_norm": float(head.norm()),
        "layer_norm": float(layer.norm()),
        "embedding_norm": float(gradients["model.embed_tokens.weight"].norm()),
        "head_entry": float(head[7, 3]),
        "other_head_entry": float(head[21, 11]),
        "layer_entry": float(layer[5, 5]),
    }


def trl_fingerprint(case: Case) -> dict[str, float]:
    """What TRL's GRPOTrainer says."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    made, given = model(), inputs()
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = GRPOTrainer(
            model=made,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                per_device_train_batch_size=NUM_RESPONSES,
                num_generations=NUM_RESPONSES,
                max_completion_length=LIMIT,
                beta=0.0,
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                loss_type="dr_grpo" if case.dr_grpo else "dapo",
                scale_rewards="none" if case.dr_grpo else "group",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"] * NUM_RESPONSES}),
            processing_class=_tokenizer(),
        )
    now = logprobs(made, given)
    batch = {
        "prompt_ids": given["prompt_ids"],
        "prompt_mask": torch.ones_like(given["prompt_ids"]),
        "completion_ids": given["completion_ids"],
        "completion_mask": given["completion_mask"],
        "advantages": torch.tensor(advantages(divide=not case.dr_grpo)),
        "num_items_in_batch": given["completion_mask"].sum(),
    }
    if case.old:
        batch["old_per_token_logps"] = now + given["old_difference"]
    if case.sampler:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        ratio = (given["old_difference"] - given["sampler_difference"]).exp()
        batch["importance_sampling_ratio"] = ratio.clamp(max=IMPORTANCE_CAP)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    made.zero_grad()
    loss.backward()
    return fingerprint(loss.detach(), made)


def advantages(*, divide: bool) -> list[float]:
    """The responses as one group, by the formula of ``GRPOTrainer``."""
    rewards = torch.tensor(REWARDS)
    centred = rewards - rewards.mean()
    return [float(value) for value in (centred / (rewards.std() + 1e-4) if divide else centred)]


def _tokenizer() -> Any:
    from distill.embedded.tokenizer import build_tokenizer

    return build_tokenizer()


def main() -> None:
    print(json.dumps({name: trl_fingerprint(case) for name, case in CASES.items()}, indent=1))


if __name__ == "__main__":
    main()
