"""AdamW over fp32 master weights.

At a learning rate of 2e-6 an update is smaller than a bf16 weight's rounding, so bf16 weights are only the working
copy: gradients accumulate, moments live and steps are taken in fp32, and the rounded result is written back. Where the
parameters are fp32 (an fp32 model, or a sharded one, which is gathered in bf16) they are the masters themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import NonFiniteError, UserError
from distill.stage_config import Optimiser
from students.parallel import full, slice_like, whole_on_main


class MasterAdamW:
    """AdamW with gradient accumulation in fp32 and clipping by the global norm.

    ``named_parameters`` are the ones that are trained; ``dtype`` is the student's own. ``state`` and ``load_state``
    carry everything that a resumed run needs, as plain whole tensors by name: the same for every engine.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: Optimiser,
        *,
        dtype: torch.dtype = torch.float32,
        eight_bit: bool = False,
    ) -> None:
        self.settings = settings
        self._eight_bit = eight_bit
        self._with_masters = dtype != torch.float32
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        assert self.parameters, "a model without trainable parameters cannot be trained"
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()
            for name, parameter in self.parameters.items()
        }
        masters = list(self.masters.values())
        self.adamw: torch.optim.Optimizer = (eight_bit_adamw(masters[0].device) if eight_bit else _adamw)(
            masters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )

    def accumulate(self) -> None:
        """Add the gradients of one backward pass to the masters' gradients (bf16 models; fp32 ones share them)."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, learning_rate: float, *, where: str) -> float:
        """Clip, step, write back, forget the gradients; the gradients' global norm before clipping.

        Raises NonFiniteError, before anything changes, where that norm is NaN or infinite; ``where`` names the batch.
        """
        norm = full(nn.utils.clip_grad_norm_(list(self.masters.values()), self.settings.max_grad_norm))
        if not math.isfinite(float(norm)):
            self.discard()
            raise NonFiniteError(
                f"the gradient's norm is {float(norm)} at {where}; no step was taken. Lower the learning rate, or look "
                "at the responses of this batch"
            )
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        self.discard()
        return float(norm)

    def discard(self) -> None:
        """Forget all gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Rate of step ``step`` (from 0): linear warm-up, then constant or a cosine to zero at ``num_steps``."""
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.settings.schedule == "constant":
            return peak
        progress = (step - warmup) / max(1, num_steps - warmup)
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and (bf16 students) masters, by ``kind/parameter name``, as ``whole_on_main``."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
            if self._with_masters:
                tensors[f"master/{name}"] = master
        return whole_on_main(tensors)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave; the masters of a bf16 student set its parameters too."""
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, name = key.partition("/")
                master = self.masters[name]
                if kind == "master":
                    master.copy_(slice_like(value, master))
                    self.parameters[name].copy_(master)
                elif value.dim():
                    self.adamw.state[master][kind] = slice_like(value, master).clone()
                else:
                    # How many steps: the fused AdamW reads it where the master is, bitsandbytes takes a number.
                    self.adamw.state[master][kind] = int(value) if self._eight_bit else value.to(master.device).clone()


def _adamw(parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **options)


def eight_bit_adamw(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser's class. Raises UserError where ``device`` or this installation has none."""
    if device.type != "cuda":
        raise UserError("student.adamw is 8bit, and 8-bit AdamW runs on NVIDIA GPUs only; take fp32 here")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "student.adamw is 8bit, and its package bitsandbytes is not installed; pip install it, or take fp32"
        ) from None
    made: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return made
