"""Waiting for a GPU, which works on while Python asks for more."""

from __future__ import annotations

import torch


def finish(device: torch.device) -> None:
    """Wait for all that ``device`` was asked for, so that the seconds of a phase are its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
