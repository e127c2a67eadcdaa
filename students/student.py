"""The model that learns: transformers' own Qwen3 classes, trained on whatever a stage feels.

The student gives a loss two tensors: the hidden states that predict the response tokens, and its LM head. The loss
makes logits of them tile by tile, so no [tokens, vocabulary] tensor ever exists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import interrupt
from distill.config import LoraSettings, Optimiser, StudentSettings
from distill.errors import NonFiniteError
from distill.sparse import linear_topk
from distill.types import Example, Rollout
from students.attention import PACKED
from students.batch import Batch, collate, micro_batches
from students.optimiser import MasterAdamW
from students.router import RouterLoad, load_balancing


@dataclass(frozen=True, slots=True)
class Felt:
    """What a stage's loss says of one batch.

    ``total`` is a scalar, the *sum* over response tokens of weight times loss, differentiable in the student; the
    student divides once, by the global token count. ``per_token_N`` are detached metrics, one value a token.
    """

    total: Tensor
    per_token_N: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a loss sees: the batch, and the student's states at the rows that predict its response tokens."""

    batch: Batch
    hidden_ND: Tensor
    head_VD: Tensor


Loss = Callable[[Rows], Felt]


class Student:
    """A causal language model with its optimiser.

    ``stop_ids`` are the family's stop tokens, for the stop-probability metric.
    """

    def __init__(self, model: PreTrainedModel, settings: StudentSettings, *, stop_ids: Sequence[int]) -> None:
        self.settings = settings
        self.stop_ids = list(stop_ids)
        self.model: PreTrainedModel = model
        """The causal language model itself, also where adapters are laid over it."""
        self.adapted: Any = None
        """peft's model around it, with LoRA."""
        if settings.lora is not None:
            self.adapted = _with_lora(model, settings.lora)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.set_attn_implementation(PACKED)
        assert self.model.generation_config is not None
        # A base model ends on one of the stop tokens, its teacher on another: whoever generates needs both.
        self.model.generation_config.eos_token_id = self.stop_ids
        self.model.train()
        self.optimiser: MasterAdamW | None = None

    def begin(self, settings: Optimiser) -> None:
        """Forget the last stage's moments; train on with these settings."""
        self.optimiser = MasterAdamW(self.model.named_parameters(), settings)

    @property
    def passes(self) -> int:
        """Forward-pass equivalents of a training step: forward, and backward to activations and to the weights."""
        return 3 if self.settings.lora is None else 2

    @property
    def head_VD(self) -> Tensor:
        """The LM head's weight."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight

    def rows(self, batch: Batch) -> tuple[Rows, RouterLoad | None]:
        """The student's states for ``batch``, and its router's load where it has a router."""
        body = cast(nn.Module, self.model.get_decoder())
        is_moe = hasattr(self.model.config, "router_aux_loss_coef")
        options = {"output_router_logits": True} if is_moe else {}
        output = body(
            input_ids=batch.input_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            **batch.packing.keywords(),
            **options,
        )
        hidden_ND = output.last_hidden_state[0].index_select(0, batch.row_N)
        router = load_balancing(output.router_logits, self.model.config) if is_moe else None
        return Rows(batch, hidden_ND, self.head_VD), router

    @torch.no_grad()
    def most_probable(self, rollouts: Sequence[Rollout], k: int) -> list[Tensor]:
        """The k ids [R, k] that the student holds most probable at each response token; the stop ids are among them."""
        found: dict[int, Tensor] = {}
        places = {id(rollout): place for place, rollout in enumerate(rollouts)}
        for group in micro_batches([Example(rollout) for rollout in rollouts], self.settings.micro_batch_tokens):
            interrupt.check()
            rows, _ = self.rows(collate(group, self.model.device))
            ids_NK, _, _ = linear_topk(rows.hidden_ND, rows.head_VD, k, always=self.stop_ids)
            parts = ids_NK.split([len(example.rollout.response_ids) for example in group])
            found |= {places[id(example.rollout)]: part for example, part in zip(group, parts, strict=True)}
        return [found[place] for place in range(len(rollouts))]

    def step(self, examples: Sequence[Example], loss: Loss, *, step: int, num_steps: int, where: str) -> dict[str, Any]:
        """One optimiser step on ``examples``; its metrics.

        The loss is the mean over all tokens that carry weight, of all micro-batches together: dividing inside each
        micro-batch would weigh a token by how short its neighbours happen to be. Raises NonFiniteError before the
        step where the loss or a gradient is not finite.
        """
        optimiser = self.optimiser
        assert optimiser is not None, "begin() comes before step()"
        started = time.perf_counter()
        batches = [
            collate(group, self.model.device) for group in micro_batches(examples, self.settings.micro_batch_tokens)
        ]
        num_weighted = sum(batch.num_weighted for batch in batches)
        assert num_weighted > 0, "a step without a token that carries loss"
        table = _Means()
        total = 0.0
        try:
            for batch in batches:
                interrupt.check()
                rows, router = self.rows(batch)
                felt = loss(rows)
                objective = felt.total / num_weighted
                value = float(objective.detach())
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"the loss is {value} at {where}; no step was taken. Lower the learning rate, or look at the "
                        "responses of this batch"
                    )
                total += value
                if router is not None:
                    share = batch.num_weighted / num_weighted
                    objective = objective + share * self.model.config.router_aux_loss_coef * router.loss
                    table.add_scalar("router.aux_loss", float(router.loss.detach()), share)
                    table.add_scalar("router.max_load", router.max_load, share)
                objective.backward()
                optimiser.accumulate()
                table.add_tokens(batch, {**felt.per_token_N, **self._stops(rows, felt)})
        except BaseException:
            optimiser.discard()
            raise
        rate = optimiser.learning_rate(step, num_steps)
        norm = optimiser.step(rate, where=where)
        return {
            "loss": total,
            **table.means(),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": int(num_weighted),
            "seconds.train": time.perf_counter() - started,
        }

    @torch.no_grad()
    def _stops(self, rows: Rows, felt: Felt) -> dict[str, Tensor]:
        """The probability of ending the response, at every row.

        The loss knows log p of the sampled token, so the normaliser is that token's logit minus it; no second pass
        over the vocabulary is needed.
        """
        if "sampled_logprob" not in felt.per_token_N:
            return {}
        hidden_ND, target_N = rows.hidden_ND.float(), rows.batch.target_N
        sampled_logit_N = (hidden_ND * rows.head_VD[target_N].float()).sum(dim=-1)
        normaliser_N = sampled_logit_N - felt.per_token_N["sampled_logprob"]
        stop_logit_NS = hidden_ND @ rows.head_VD[self.stop_ids].float().T
        return {"stop_probability": (stop_logit_NS.logsumexp(dim=-1) - normaliser_N).exp()}

    def export(self, folder: Path) -> None:
        """Write the model as a plain transformers checkpoint (adapters merged into a copy of the weights)."""
        if self.adapted is None:
            self.model.save_pretrained(folder)
            return
        from copy import deepcopy

        merged = deepcopy(self.adapted).merge_and_unload()
        merged.save_pretrained(folder)

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name, as they are in the model."""
        return {
            name: parameter.detach() for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``weights`` gave."""
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        assert parameters.keys() == tensors.keys(), "the checkpoint's trained parameters are not this student's"
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)


class _Means:
    """Means over the step's weighted tokens, all together and by mode."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, share: float) -> None:
        self._scalars[name] = self._scalars.get(name, 0.0) + share * value

    def add_tokens(self, batch: Batch, values: dict[str, Tensor]) -> None:
        for name, value_N in values.items():
            for prefix, mask_N in (("", None), ("think.", batch.think_N), ("no_think.", ~batch.think_N)):
                weight_N = batch.weight_N if mask_N is None else batch.weight_N * mask_N
                key = prefix + name
                self._sums[key] = self._sums.get(key, 0.0) + float((weight_N * value_N).sum())
                self._counts[key] = self._counts.get(key, 0.0) + float(weight_N.sum())

    def means(self) -> dict[str, float | None]:
        """A mode without tokens in this step has no mean: null, never NaN."""
        by_token = {key: self._sums[key] / self._counts[key] if self._counts[key] else None for key in self._sums}
        return {**by_token, **self._scalars}


def _with_lora(model: PreTrainedModel, settings: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        ),
    )
