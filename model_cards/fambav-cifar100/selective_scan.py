"""The selective scan of Mamba over several directions at once, and the causal convolution before it (paper eq. 2-3).

Glossary
    G             directions: 1 is a plain causal scan; 2 adds one that runs time backwards (Vim). The backward
                  direction reads and writes its tensors at the positions of the sequence, nobody has to flip them.
    B, T, E       batch, tokens, channels (intermediate size)
    N             state size; h_t, the state of a channel, has N entries and is kept in float32
    K             taps of the convolution
    x  (G,B,T,E)  input, u in Mamba's code
    dt (G,B,T,E)  time step before bias and softplus; delta after them
    A  (G,E,N)    decay, negative
    B, C (G,B,T,N)  input and output projections of the state, chosen by the input
    D  (G,E)      skip connection
    z  (B,T,E)    gate, shared by the directions

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t h_t + D x_t
        out = silu(z) * mean over directions of y

`selective_scan` and `causal_conv1d` are the API; backends.py chooses the backend. Backends are files of their own:
selective_scan_numba.py (CPU), selective_scan_triton.py and selective_scan_mamba_ssm.py (CUDA) and
selective_scan_torch.py (anywhere); `selective_scan_reference` is what all of them are tested against.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import HAS_KERNELS, provides, selective_scan_backend, states_shape
from .operators import define
from .selective_scan_torch import conv as torch_conv
from .selective_scan_torch import gated_mean, time_steps
from .selective_scan_torch import scan as torch_scan


class ScanKernels(NamedTuple):
    """Functions that a backend in `HAS_KERNELS` provides, see selective_scan_numba.py and causal_conv1d_numba.py."""

    scan_forward: Callable
    scan_backward: Callable
    conv_forward: Callable
    conv_backward: Callable


@provides("numba")
def _numba_kernels() -> ScanKernels:
    from .causal_conv1d_numba import conv_backward, conv_forward
    from .selective_scan_numba import scan_backward, scan_forward

    return ScanKernels(scan_forward, scan_backward, conv_forward, conv_backward)


@provides("triton")
def _triton_kernels() -> ScanKernels:
    from .selective_scan_triton import conv_backward, conv_forward, scan_backward, scan_forward

    return ScanKernels(scan_forward, scan_backward, conv_forward, conv_backward)


@provides("mamba-ssm")
def _mamba_ssm_scan() -> Callable:
    from .selective_scan_mamba_ssm import scan

    return scan


def kernels_of(backend: str) -> ScanKernels:
    """The kernels of a backend in `HAS_KERNELS`."""
    return {"numba": _numba_kernels, "triton": _triton_kernels}[backend]()


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_scale: Tensor | None = None,
) -> Tensor:
    """Scan the sequence in every direction and average the gated results.

    Args:
        x (`Tensor` of shape `(G, B, T, E)`): input of each direction, at the positions of the sequence.
        dt (`Tensor` of shape `(G, B, T, E)`): time steps before bias and softplus.
        A (`Tensor` of shape `(G, E, N)`): decay, negative.
        B, C (`Tensor` of shape `(G, B, T, N)`): input and output projections.
        D (`Tensor` of shape `(G, E)`): skip connection.
        z (`Tensor` of shape `(B, T, E)`, *optional*): gate.
        dt_bias (`Tensor` of shape `(G, E)`, *optional*): bias of the time steps.
        dt_scale (`Tensor` of shape `(B, T)`, *optional*):
            Factor of the time steps after the softplus, the size of a fused token. No gradient flows to it.

    Returns:
        `Tensor` of shape `(B, T, E)` in the dtype of `x`.

    Raises:
        ValueError: if a shape does not fit, or there are not one or two directions.
        ImportError: if the backend that was asked for is not installed.
    """
    _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    backend = selective_scan_backend(x)
    if backend in HAS_KERNELS:
        return _fused_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale, torch.is_grad_enabled(), backend)[0]
    if backend == "mamba-ssm":
        return _mamba_ssm_scan()(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    return torch_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)


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
    backend = selective_scan_backend(x)
    if backend in HAS_KERNELS:
        return _fused_conv(x, weight, bias, backend)
    return torch_conv(x, weight, bias)


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations at the head of this file, one token after the other: what every backend is tested against.

    Args: as `selective_scan`.

    Returns:
        the output `(B, T, E)` and the last state of each direction `(G, B, E, N)`.
    """
    delta = time_steps(dt, dt_bias, dt_scale)
    x_, A, B, C, D = (tensor.to(delta.dtype) for tensor in (x, A, B, C, D))
    num_tokens = x.shape[2]
    outputs, last_states = [], []
    for g in range(x.shape[0]):
        h = torch.zeros_like(x_[g, :, 0, :, None] * A[g])  # (B, E, N)
        y = [None] * num_tokens
        for t in range(num_tokens) if g == 0 else reversed(range(num_tokens)):
            decay = torch.exp(delta[g, :, t, :, None] * A[g])
            h = decay * h + (delta[g, :, t] * x_[g, :, t]).unsqueeze(-1) * B[g, :, t, None, :]
            y[t] = (h * C[g, :, t, None, :]).sum(-1) + D[g] * x_[g, :, t]
        outputs.append(torch.stack(y, dim=1))
        last_states.append(h)
    return gated_mean(torch.stack(outputs), z).to(x.dtype), torch.stack(last_states)


def _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> None:
    if x.dim() != 4 or not 1 <= x.shape[0] <= 2 or x.shape[2] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (1 or 2 directions, batch, tokens >= 1, channels)")
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size = A.shape[-1]
    _check_shape("dt", dt, tuple(x.shape))
    _check_shape("A", A, (num_directions, channels, state_size))
    _check_shape("B", B, (num_directions, batch_size, num_tokens, state_size))
    _check_shape("C", C, (num_directions, batch_size, num_tokens, state_size))
    _check_shape("D", D, (num_directions, channels))
    _check_shape("z", z, (batch_size, num_tokens, channels))
    _check_shape("dt_bias", dt_bias, (num_directions, channels))
    _check_shape("dt_scale", dt_scale, (batch_size, num_tokens))


def _check_conv(x, weight, bias) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (batch, tokens >= 1, channels)")
    if weight.dim() != 3 or not 1 <= weight.shape[0] <= 2 or weight.shape[1] != x.shape[2] or weight.shape[2] == 0:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: expected (1 or 2 directions, {x.shape[2]} channels, taps >= 1)"
        )
    _check_shape("bias", bias, tuple(weight.shape[:2]))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}")


# ---- kernels as torch operators ----


def _compute_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the states that the backward pass starts from (empty unless `keep_states`)."""
    return kernels_of(backend).scan_forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states)


def _scan_shapes(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states, backend):
    return x.new_empty(x.shape[1:]), x.new_empty(states_shape(backend, x, A, keep_states), dtype=torch.float32)


def _compute_scan_backward(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and, if they are given, z and dt_bias."""
    gradients = kernels_of(backend).scan_backward(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states)
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    return [
        gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, inputs) if tensor is not None
    ]


def _scan_backward_shapes(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, backend):
    return [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D, z, dt_bias) if tensor is not None]


_fused_scan_backward = define("selective_scan_backward", _compute_scan_backward, _scan_backward_shapes)


def _save_scan(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.backend = inputs[10]


def _backward_of_scan(ctx, dout, _):
    inputs = ctx.saved_tensors
    gradients = iter(_fused_scan_backward(dout, *inputs, ctx.backend))
    differentiable = [next(gradients) if tensor is not None else None for tensor in inputs[:8]]
    return *differentiable, None, None, None


_fused_scan = define("selective_scan", _compute_scan, _scan_shapes, _save_scan, _backward_of_scan)


def _compute_conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return kernels_of(backend).conv_forward(x, weight, bias)


def _conv_shapes(x, weight, bias, backend):
    return x.new_empty(weight.shape[0], *x.shape)


def _compute_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = kernels_of(backend).conv_backward(dout, x, weight, bias)
    return dx.to(x.dtype), dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype).contiguous()


def _conv_backward_shapes(dout, x, weight, bias, backend):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))


_fused_conv_backward = define("causal_conv1d_backward", _compute_conv_backward, _conv_backward_shapes)


def _save_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.backend = inputs[3]


def _backward_of_conv(ctx, dout):
    return *_fused_conv_backward(dout, *ctx.saved_tensors, ctx.backend), None


_fused_conv = define("causal_conv1d", _compute_conv, _conv_shapes, _save_conv, _backward_of_conv)
