"""What the launches of all Triton kernels share."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one.

    A product and a sum become one instruction: Triton's default today, no longer from 3.10 on.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=True, **options)


def as_rows(tensor: Tensor) -> Tensor:
    """Everything but the last dimension as rows; a view wherever the strides allow it."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])
