"""The device for a model when nobody chooses one."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU or another), or the CPU if there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None else device
