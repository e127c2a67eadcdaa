"""AdamW over fp32 master weights.

At a learning rate of 2e-6 an update is smaller than a bf16 weight's rounding, so bf16 weights are only the working
copy: gradients accumulate, moments live and steps are taken in fp32, and the rounded result is written back. For fp32
models the masters are the parameters themselves and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill.config import Optimiser
from distill.errors import NonFiniteError


class MasterAdamW:
    """AdamW with gradient accumulation in fp32 and clipping by the global norm.

    ``named_parameters`` are the ones that are trained. ``state`` and ``load_state`` carry everything that a resumed
    run needs, as plain tensors by name.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimiser) -> None:
        self.settings = settings
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        assert self.parameters, "a model without trainable parameters cannot be trained"
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float().clone()
            for name, parameter in self.parameters.items()
        }
        self.adamw = torch.optim.AdamW(
            list(self.masters.values()),
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
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), self.settings.max_grad_norm)
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
        """Moments, step counts and (bf16 models) masters, by ``kind/parameter name``."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}/{name}"] = value
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``state`` gave; the masters of a bf16 model set its parameters too."""
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, name = key.partition("/")
                master = self.masters[name]
                if kind == "master":
                    master.copy_(value)
                    self.parameters[name].copy_(value)
                else:
                    self.adamw.state[master][kind] = value.to(master.device if value.dim() else "cpu").clone()
