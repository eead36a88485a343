"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Plain torch is a chain of six passes over the tokens on a CPU; the kernel (rms_norm_numba.py) is one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan import uses_cpu_kernels

_LANES = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of tokens, computed in the dtype of `x` and returned in the dtype of `weight`.

    Args:
        x (`Tensor` of shape `(..., D)`): the residual stream, which may be wider than the weights.
        weight (`Tensor` of shape `(D,)`).
        eps (`float`): added to the mean square.

    Returns:
        `Tensor` of shape `(..., D)`.
    """
    if x.dtype == weight.dtype == torch.float32 and x.shape[-1] % _LANES == 0 and uses_cpu_kernels(x):
        return _rms_norm(x, weight, eps)[0]
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)


# ---- the kernel as a torch operator, for torch.compile, autocast, checkpointing and export ----


@torch.library.custom_op("fambav::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / sqrt(mean(x^2) + eps) of every token."""
    from .rms_norm_numba import rms_norm_forward

    return rms_norm_forward(x, weight, eps)


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


@torch.library.custom_op("fambav::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    from .rms_norm_numba import rms_norm_backward

    return rms_norm_backward(dout, x, weight, inverse)


@_rms_norm_backward.register_fake
def _(dout, x, weight, inverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


_rms_norm.register_autograd(
    lambda ctx, dout, _: (*_rms_norm_backward(dout, *ctx.saved_tensors), None), setup_context=_save
)
