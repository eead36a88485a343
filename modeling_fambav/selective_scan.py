"""The selective scan of Mamba over several directions at once (paper eq. 2-3).

Glossary
    G             directions: 1 is a plain causal scan; 2 adds one that runs time backwards (Vim). The backward
                  direction reads and writes its tensors at the positions of the sequence, nobody has to flip them.
    B, T, E       batch, tokens, channels (intermediate size)
    N             state size; h_t, the state of a channel, has N entries and is kept in float32
    x  (G,B,T,E)  input, u in Mamba's code
    dt (G,B,T,E)  time step before bias and softplus; delta after them
    A  (G,E,N)    decay, negative
    B, C (G,B,T,N)  input and output projections of the state, chosen by the input
    D  (G,E)      skip connection
    z  (B,T,E)    gate, shared by the directions

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t h_t + D x_t
        out = silu(z) * mean over directions of y

`selective_scan` is the API; backends.py chooses the backend. Backends are files of their own: selective_scan_numba.py
(CPU), selective_scan_triton.py and selective_scan_mamba_ssm.py (CUDA) and selective_scan_torch.py (anywhere).
`selective_scan_reference` is what all of them are tested against, and shares no code with them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import HAS_KERNELS, provides, selective_scan_backend, states_shape
from .operators import check_shape, define
from .selective_scan_torch import scan as torch_scan


class ScanKernels(NamedTuple):
    """Functions that a backend in `HAS_KERNELS` provides, see selective_scan_numba.py."""

    forward: Callable
    backward: Callable


@provides("numba")
def _numba_kernels() -> ScanKernels:
    from .selective_scan_numba import scan_backward, scan_forward

    return ScanKernels(scan_forward, scan_backward)


@provides("triton")
def _triton_kernels() -> ScanKernels:
    from .selective_scan_triton import scan_backward, scan_forward

    return ScanKernels(scan_forward, scan_backward)


@provides("mamba-ssm")
def _mamba_ssm_scan() -> Callable:
    from .selective_scan_mamba_ssm import scan

    return scan


def scan_kernels(backend: str) -> ScanKernels:
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
    return scan_on(selective_scan_backend(x), x, dt, A, B, C, D, z, dt_bias, dt_scale)


def scan_on(
    backend: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
) -> Tensor:
    """As `selective_scan`, on a backend that was chosen before; the shapes are taken to fit."""
    if backend in HAS_KERNELS:
        return _scan(x, dt, A, B, C, D, z, dt_bias, dt_scale, torch.is_grad_enabled(), backend)[0]
    if backend == "mamba-ssm":
        return _mamba_ssm_scan()(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    return torch_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)


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
    num_directions, _, num_tokens, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs, last_states = [], []
    for g in range(num_directions):
        x_g, dt_g, A_g, B_g, C_g, D_g = (tensor[g].to(dtype) for tensor in (x, dt, A, B, C, D))
        delta = F.softplus(dt_g if dt_bias is None else dt_g + dt_bias[g].to(dtype))
        if dt_scale is not None:
            delta = delta * dt_scale[..., None].detach()
        h = torch.zeros_like(x_g[:, 0, :, None] * A_g)  # (B, E, N)
        y = {}
        for t in range(num_tokens) if g == 0 else reversed(range(num_tokens)):
            delta_t, x_t = delta[:, t, :, None], x_g[:, t, :, None]
            h = torch.exp(delta_t * A_g) * h + delta_t * B_g[:, t, None] * x_t
            y[t] = (C_g[:, t, None] * h).sum(-1) + D_g * x_t.squeeze(-1)
        outputs.append(torch.stack([y[t] for t in range(num_tokens)], dim=1))
        last_states.append(h)
    out = torch.stack(outputs).mean(0)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype), torch.stack(last_states)


def _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> None:
    if x.dim() != 4 or not 1 <= x.shape[0] <= 2 or x.shape[2] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (1 or 2 directions, batch, tokens >= 1, channels)")
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size = A.shape[-1]
    check_shape("dt", dt, tuple(x.shape))
    check_shape("A", A, (num_directions, channels, state_size))
    check_shape("B", B, (num_directions, batch_size, num_tokens, state_size))
    check_shape("C", C, (num_directions, batch_size, num_tokens, state_size))
    check_shape("D", D, (num_directions, channels))
    check_shape("z", z, (batch_size, num_tokens, channels))
    check_shape("dt_bias", dt_bias, (num_directions, channels))
    check_shape("dt_scale", dt_scale, (batch_size, num_tokens))


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
    return scan_kernels(backend).forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states)


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
    gradients = scan_kernels(backend).backward(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states)
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    return [
        gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, inputs) if tensor is not None
    ]


def _scan_backward_shapes(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, backend):
    return [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D, z, dt_bias) if tensor is not None]


_scan_backward = define("selective_scan_backward", _compute_scan_backward, _scan_backward_shapes)


def _save_scan(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.backend = inputs[10]


def _backward_of_scan(ctx, dout, _):
    inputs = ctx.saved_tensors
    gradients = iter(_scan_backward(dout, *inputs, ctx.backend))
    differentiable = [next(gradients) if tensor is not None else None for tensor in inputs[:8]]
    return *differentiable, None, None, None


_scan = define("selective_scan", _compute_scan, _scan_shapes, _save_scan, _backward_of_scan)
