"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Plain torch is a chain of six passes over the tokens on a CPU; the kernel (rms_norm_numba.py) is one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import provides, uses_cpu_kernels
from .operators import define

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


@provides("numba")
def _kernels() -> tuple[Callable, Callable]:
    from .rms_norm_numba import rms_norm_backward, rms_norm_forward

    return rms_norm_forward, rms_norm_backward


# ---- the kernel as a torch operator ----


def _compute(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / sqrt(mean(x^2) + eps) of every token."""
    return _kernels()[0](x, weight, eps)


def _shapes(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _compute_backward(dout: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels()[1](dout, x, weight, inverse)


def _backward_shapes(dout, x, weight, inverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_rms_norm_backward = define("rms_norm_backward", _compute_backward, _backward_shapes)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx, dout, _):
    return *_rms_norm_backward(dout, *ctx.saved_tensors), None


_rms_norm = define("rms_norm", _compute, _shapes, _save, _backward)
