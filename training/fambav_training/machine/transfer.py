"""Copies between the host and a device that nobody waits for.

A program that reads a value of a GPU waits until the GPU has done all that was asked of it, and the GPU then waits for
the program. So does a copy from memory that is not pinned.
"""

import torch
from torch import Tensor

# Devices whose copies to the host can go on behind the program, and whose events tell when they are done
_COPY_BEHIND = ("cuda", "xpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, by a copy that may still be under way; work on the device waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class LateValues:
    """Values of a device that are copied to the host at once, and waited for only when they are read."""

    def __init__(self, values: Tensor):
        self._values, self._arrival = values.detach(), None
        if values.device.type in _COPY_BEHIND:
            self._values = self._values.to("cpu", non_blocking=True)
            self._arrival = torch.Event(values.device)
            self._arrival.record()

    def read(self) -> list[float]:
        """The values. Waits for the work that they come from, not for what the device was asked to do later."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()
