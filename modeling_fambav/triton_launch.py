"""What the launches of all Triton kernels share."""

from torch import Tensor

# A product and a sum in one instruction: Triton's default today, no longer from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}


def as_float32_rows(tensor: Tensor) -> Tensor:
    """Everything but the last dimension as rows; a view wherever the strides allow it."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])
