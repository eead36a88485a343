"""The causal convolution before the scan, with its SiLU, in every direction at once (Vim's mixer).

Names are those of `selective_scan.py`: the backward direction looks ahead instead of back and reads and writes its
tensors at the positions of the sequence, so nobody has to flip them.

        out_t = silu(bias + sum over taps k of weight_k x_{t - (K - 1 - k)})

`causal_conv1d` is the API; backends.py chooses the backend. Kernels are in causal_conv1d_numba.py (CPU) and
causal_conv1d_triton.py (CUDA), the plain torch version is in this file.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import HAS_KERNELS, provides, selective_scan_backend
from .operators import check_shape, define


class ConvKernels(NamedTuple):
    """Functions that a backend in `HAS_KERNELS` provides, see causal_conv1d_numba.py."""

    forward: Callable
    backward: Callable


@provides("numba")
def _numba_kernels() -> ConvKernels:
    from .causal_conv1d_numba import conv_backward, conv_forward

    return ConvKernels(conv_forward, conv_backward)


@provides("triton")
def _triton_kernels() -> ConvKernels:
    from .causal_conv1d_triton import conv_backward, conv_forward

    return ConvKernels(conv_forward, conv_backward)


def conv_kernels(backend: str) -> ConvKernels:
    """The kernels of a backend in `HAS_KERNELS`."""
    return {"numba": _numba_kernels, "triton": _triton_kernels}[backend]()


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU in every direction; the backward one looks ahead instead of back.

    Args:
        x (`Tensor` of shape `(B, T, E)`): input, shared by the directions.
        weight (`Tensor` of shape `(G, E, K)`): the last tap belongs to the current token.
        bias (`Tensor` of shape `(G, E)`).

    Returns:
        `Tensor` of shape `(G, B, T, E)` in the dtype of `x`.

    Raises:
        ValueError: if a shape does not fit.
        ImportError: if the backend that was asked for is not installed.
    """
    _check_conv(x, weight, bias)
    return conv_on(selective_scan_backend(x), x, weight, bias)


def conv_on(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `causal_conv1d`, on a backend that was chosen before; the shapes are taken to fit."""
    if backend in HAS_KERNELS:
        return _conv(x, weight, bias, backend)
    return causal_conv1d_torch(x, weight, bias)


def causal_conv1d_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `causal_conv1d`, on any device, in float32 or wider, with gradients by autograd."""
    dtype, num_tokens, last_tap = x.dtype, x.shape[1], weight.shape[-1] - 1
    x, weight, bias = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (x, weight, bias))
    padded = F.pad(x, (0, 0, last_tap, last_tap))
    outputs = []
    for direction in range(weight.shape[0]):
        output = bias[direction].expand_as(x)
        for tap in range(last_tap + 1):
            first = tap if direction == 0 else 2 * last_tap - tap
            output = torch.addcmul(output, padded[:, first : first + num_tokens], weight[direction, :, tap])
        outputs.append(output)
    return F.silu(torch.stack(outputs)).to(dtype)


def _check_conv(x, weight, bias) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (batch, tokens >= 1, channels)")
    if weight.dim() != 3 or not 1 <= weight.shape[0] <= 2 or weight.shape[1] != x.shape[2] or weight.shape[2] == 0:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: expected (1 or 2 directions, {x.shape[2]} channels, taps >= 1)"
        )
    check_shape("bias", bias, tuple(weight.shape[:2]))


# ---- kernels as torch operators ----


def _compute_conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return conv_kernels(backend).forward(x, weight, bias)


def _conv_shapes(x, weight, bias, backend):
    return x.new_empty(weight.shape[0], *x.shape)


def _compute_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = conv_kernels(backend).backward(dout, x, weight, bias)
    return dx.to(x.dtype), dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype).contiguous()


def _conv_backward_shapes(dout, x, weight, bias, backend):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))


_conv_backward = define("causal_conv1d_backward", _compute_conv_backward, _conv_backward_shapes)


def _save_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.backend = inputs[3]


def _backward_of_conv(ctx, dout):
    return *_conv_backward(dout, *ctx.saved_tensors, ctx.backend), None


_conv = define("causal_conv1d", _compute_conv, _conv_shapes, _save_conv, _backward_of_conv)
