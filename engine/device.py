"""The way from the host to where the model is. Knows tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor


def select(device: torch.device) -> None:
    """Make it the one that streams, events and Triton's kernels of this thread are of, whichever of several it is."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device. CUDA is not waited for, nor does it have to be idle first: that takes memory
    which the system cannot move."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
