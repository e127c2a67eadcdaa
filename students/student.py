"""The model that learns: transformers' own Qwen3 classes, trained on whatever a stage feels.

The student gives a loss two tensors: the hidden states that predict the response tokens, and its LM head. The loss
makes logits of them tile by tile, so no [tokens, vocabulary] tensor ever exists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.adapters import check_adapters
from distill.attention import PACKED
from distill.costs import training_passes
from distill.device import finish
from distill.errors import NonFiniteError
from distill.family import Shape
from distill.model_config import StudentSettings
from distill.spans import Span
from distill.stage_config import Optimiser
from distill.types import Example, Rollout
from students.adapter import adapter_layers, merged, with_lora, write_adapter
from students.batch import Batch, collate, judged, micro_batches
from students.loss import Loss, Rows, stop_probability
from students.means import Means
from students.optimiser import MasterAdamW
from students.parallel import Engine, Pass, gathered, keep_root, release, replicated, sharded, slice_like, whole_on_main
from students.ranks import ALONE, Ranks
from students.router import RouterLoad, load_balancing


@dataclass(frozen=True, slots=True)
class _Reading:
    """The first micro-batch's forward pass, made before its responses were judged, with the weights of that time."""

    rollouts: list[Rollout]
    rows: Rows
    router: RouterLoad | None
    num_changes: int
    seconds: float


class Student:
    """A causal language model with its optimiser, one of the run's processes' part of it.

    ``stop_ids`` are the family's stop tokens, for the stop-probability metric. Raises UserError for adapters that
    cannot be laid over this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: StudentSettings,
        *,
        stop_ids: Sequence[int],
        ranks: Ranks = ALONE,
        engine: Engine = "alone",
    ) -> None:
        self.settings = settings
        self.stop_ids = list(stop_ids)
        self.ranks, self.engine = ranks, engine
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.model: PreTrainedModel = model
        """The causal language model itself, also where adapters are laid over it."""
        self.adapted: Any = None
        """peft's model around it, with LoRA."""
        if settings.lora is not None:
            check_adapters(settings, Shape.from_config(model.config.to_dict()))
            self.adapted = with_lora(model, settings.lora)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.set_attn_implementation(PACKED)
        assert self.model.generation_config is not None
        # A base model ends on one of the stop tokens, its teacher on another: whoever generates needs both.
        self.model.generation_config.eos_token_id = self.stop_ids
        self.model.train()
        whole = Pass(self.model, self._felt)
        if engine == "sharded":
            sharded(whole, self.model, self.dtype, ranks.device, offload=settings.cpu_offload)
        self._pass: nn.Module = replicated(whole) if engine == "replicated" else whole
        self.optimiser: MasterAdamW | None = None
        self._is_whole = False
        """Within ``whole``; slices that an inner block put back would be gathered by every process or by none."""
        self._reading: _Reading | None = None
        self.num_changes = 0
        """How often its weights have changed; who holds a copy of them knows by it whether the copy is old."""

    def begin(self, settings: Optimiser) -> None:
        """Forget the last stage's moments; train on with these settings."""
        self._reading = None
        self._round()
        self.optimiser = MasterAdamW(
            self.model.named_parameters(), settings, dtype=self.dtype, eight_bit=self.settings.adamw == "8bit"
        )

    def end(self) -> None:
        """The stage is over: what is examined and exported now is what its checkpoint holds."""
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Slices and adapters are masters themselves: give them values of the student's own dtype, as a checkpoint
        does. So a run that is resumed between two stages is the same run."""
        if all(parameter.dtype == self.dtype for parameter in self.model.parameters() if parameter.requires_grad):
            return
        self.num_changes += 1
        for parameter in self.model.parameters():
            parameter.copy_(parameter.to(self.dtype))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which this process can use ``model`` at its own pace, to sample from it.

        Every process must call it; inside such a block each may open another, which does nothing.
        """
        if self._is_whole:
            yield
            return
        self._is_whole = True
        try:
            with gathered(self._pass):
                yield
        finally:
            self._is_whole = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block without dropout, as the sampler has it."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    @property
    def passes(self) -> int:
        """Forward-pass equivalents of a training step."""
        return training_passes(self.settings)

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

    def read(self, rollouts: Sequence[Rollout]) -> Span | None:
        """Make the forward pass of the next ``step``'s first micro-batch while its responses are still being judged.

        The next step has to be on these ``rollouts``, in this order, and all judged by one teacher. What it comes to is
        the same: this is the pass that it would make first, and it goes on from there. Returns when that was. One of
        several processes reads nothing: its pass is everyone's, and who fails to get its judgement would leave the
        others in the middle of theirs.
        """
        if self.engine != "alone" or not rollouts:
            return None
        began = time.perf_counter()
        group = micro_batches([Example(rollout) for rollout in rollouts], self.settings.micro_batch_tokens)[0]
        rows, router = self.rows(collate(group, self.ranks.device))
        ended = time.perf_counter()
        said = [example.rollout for example in group]
        self._reading = _Reading(said, rows, router, self.num_changes, ended - began)
        return began, ended

    def _take_reading(self, group: Sequence[Example] | None) -> _Reading | None:
        """What was read ahead, if it was this micro-batch; another one's is dropped."""
        reading, self._reading = self._reading, None
        if reading is None or group is None or reading.num_changes != self.num_changes:
            return None
        read, wanted = list(map(id, reading.rollouts)), [id(example.rollout) for example in group]
        return reading if read == wanted else None

    def step(
        self,
        examples: Sequence[Example],
        loss: Loss,
        *,
        step: int,
        num_steps: int,
        where: str,
        into: Means | None = None,
    ) -> dict[str, Any]:
        """One optimiser step on ``examples``, this process's share; the metrics are those of all.

        Those of them that are means over tokens are added to ``into``, for several optimiser steps together.

        The loss is the mean over all tokens that carry weight, of all micro-batches and processes together: dividing
        inside each micro-batch would weigh a token by how short its neighbours happen to be. Raises NonFiniteError
        before the step where the loss or a gradient is not finite.
        """
        optimiser, ranks = self.optimiser, self.ranks
        assert optimiser is not None, "begin() comes before step()"
        read_for = 0.0 if self._reading is None else self._reading.seconds
        started = time.perf_counter()
        groups = micro_batches(examples, self.settings.micro_batch_tokens) if examples else []
        num_weighted = ranks.sum({"": sum(sum(example.rollout.loss_mask) for example in examples)})[""]
        assert num_weighted > 0, "a step without a token that carries loss"
        num_passes = max(ranks.gather(len(groups)))
        table = Means()
        try:
            for place in range(num_passes):
                ranks.check()
                keep_root(self._pass, place + 1 < num_passes)
                # The engines' passes are everyone's: who has no group left makes one that counts for nothing.
                self._backward(groups[place] if place < len(groups) else None, loss, num_weighted, table)
                optimiser.accumulate()
            table = table.of_all(ranks)
            total = table.means()["loss"]
            assert total is not None
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"the loss is {total} at {where}; no step was taken. Lower the learning rate, or look at the "
                    "responses of this batch"
                )
        except BaseException:
            release(self._pass)
            optimiser.discard()
            raise
        rate = optimiser.learning_rate(step, num_steps)
        norm = optimiser.step(rate, where=where)
        self.num_changes += 1
        finish(ranks.device)
        if into is not None:
            into.add(table)
        return {
            **table.means(),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": int(num_weighted),
            "seconds.train": read_for + time.perf_counter() - started,
        }

    def _backward(self, group: Sequence[Example] | None, loss: Loss, num_weighted: float, table: Means) -> None:
        """Adds the gradients of one micro-batch, or zeros; nothing of it is held when this returns."""
        reading, batch, device = self._take_reading(group), None, self.ranks.device
        if group is not None:
            batch = collate(group, device) if reading is None else judged(reading.rows.batch, group, device)
        self._pass(batch, loss, num_weighted, table, reading).backward()

    def _nothing(self) -> Tensor:
        """Zero, by way of every parameter."""
        body = cast(nn.Module, self.model.get_decoder())
        state = body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.ranks.device), use_cache=False)
        touched: Tensor = state.last_hidden_state.sum() + self.head_VD[0].sum()
        return 0.0 * touched

    def _felt(
        self, batch: Batch | None, loss: Loss, num_weighted: float, table: Means, reading: _Reading | None
    ) -> Tensor:
        """The batch's part of the step's loss, from its ``reading`` where it has one; its metrics go into ``table``.

        It is taken as often as there are processes, over whose gradients the engines average.
        """
        if batch is None:
            return self._nothing()
        if reading is None:
            rows, router = self.rows(batch)
        else:
            rows, router = replace(reading.rows, batch=batch), reading.router
        # The denominator goes into the weights: a total that is divided later has the head's gradient copied for it.
        scale = self.ranks.count / num_weighted
        felt = loss(replace(rows, batch=replace(batch, weight_N=batch.weight_N * scale)))
        objective = felt.total
        table.add_tokens(batch, {**felt.per_token_N, **stop_probability(rows, felt, self.stop_ids)})
        table.add_sum("loss", float(objective.detach()) / scale, batch.num_weighted)
        if router is not None:
            share = batch.num_weighted / num_weighted
            objective = objective + self.ranks.count * share * self.model.config.router_aux_loss_coef * router.loss
            for name, value in (("aux_loss", float(router.loss.detach())), ("max_load", router.max_load)):
                table.add_sum(f"router.{name}", batch.num_weighted * value, batch.num_weighted)
        return objective

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the model as a plain transformers checkpoint (adapters merged into copies of the weights).

        ``weights`` are what ``weights`` gave; without adapters the model is written with these.
        """
        if self.adapted is not None:
            # One after the other, so that the device holds no second model.
            weights = {name: weight.to("cpu") for name, weight in self.merged_weights()}
        self.model.config.dtype = self.dtype  # a sharded student's parameters are fp32, whatever it is
        self.model.save_pretrained(folder, state_dict=weights)

    def write_adapter(self, folder: Path) -> None:
        """Write the adapters as peft does, in the student's dtype. Of a student that is whole in this process."""
        write_adapter(self.adapted, self.dtype, folder)

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name, in the student's dtype, as ``whole_on_main``."""
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return whole_on_main({name: value.detach().to(self.dtype) for name, value in trained.items()})

    @torch.no_grad()
    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name in a plain checkpoint, in the student's dtype, adapters merged into them; tied ones
        once. Of a student that is whole in this process."""
        adapters = {} if self.adapted is None else adapter_layers(self.model)
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            weight = parameter.detach()
            if name in adapters:
                weight = merged(weight, adapters[name])
            yield name.replace(".base_layer", ""), weight.to(self.dtype)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``weights`` gave."""
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        assert parameters.keys() == tensors.keys(), "the checkpoint's trained parameters are not this student's"
        self.num_changes += 1
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(slice_like(value, parameters[name]))
