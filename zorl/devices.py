"""The device for a model when nobody chooses one."""

from __future__ import annotations

import os

import torch


def best_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU or another), or the CPU if there is none.

    Of several processes that torchrun or accelerate has started, each has its own, also before anything has chosen it.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return torch.device("cpu")
    number = os.environ.get("LOCAL_RANK")
    return device if number is None else torch.device(device.type, int(number) % torch.accelerator.device_count())
