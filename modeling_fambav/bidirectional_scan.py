"""All that a mixer does between its two projections: convolution, choice of the time step, B and C, scan, gate.

`bidirectional_scan` is one operator on the kernels of ours: it keeps only its inputs, the chosen (dt, B, C) and a few
states, and its backward pass computes the convolution and the time steps again. They are cheap, and storing them would
double the memory of a layer. `bidirectional_scan_in_parts` is the same from separate operators, with their own
gradients: the path of plain torch, and the reference in tests. Names are those of `selective_scan.py`, and

    R               time_step_rank
    xz (B,T,2E)     output of in_proj: input x and gate z
    chosen (G,B*T,R+2N)  what x_proj chooses by the input: low-rank dt, B and C
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import HAS_KERNELS, provides, selective_scan_backend, states_shape
from .causal_conv1d import conv_kernels, conv_on
from .operators import define
from .selective_scan import scan_kernels, scan_on
from .workspace import temporaries, temporary

_GPU_PARTS = 64  # of a batch at most, in which a GPU adds up the gradients of projections


@provides("mamba-ssm")
def _mamba_ssm_scan() -> Callable:
    from .bidirectional_scan_mamba_ssm import bidirectional_scan

    return bidirectional_scan


def bidirectional_scan(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_scale: Tensor | None = None,
) -> Tensor:
    """Convolve, choose, scan in both directions, gate and average (paper equations 2-3, Vim's mixer).

    Args:
        xz (`Tensor` of shape `(B, T, 2E)`): input and gate; its dtype is that of the matrix products.
        conv_weight, conv_bias (`Tensor` of shape `(G, E, K)` and `(G, E)`): causal convolution of each direction.
        x_proj (`Tensor` of shape `(G, R + 2N, E)`): projects the convolved input to low-rank dt, B and C.
        dt_proj, dt_bias (`Tensor` of shape `(G, E, R)` and `(G, E)`): widen dt to all channels.
        A (`Tensor` of shape `(G, E, N)`): decay, negative, float32.
        D (`Tensor` of shape `(G, E)`): skip connection.
        dt_scale (`Tensor` of shape `(B, T)`, *optional*): factor of each token's time step; no gradient flows to it.

    Returns:
        `Tensor` of shape `(B, T, E)` in the dtype of `xz`.

    Raises:
        ImportError: if the backend that was asked for is not installed.
    """
    x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
    backend = selective_scan_backend(xz)
    arguments = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, dt_scale)
    if backend in HAS_KERNELS:
        return _scan(*arguments, torch.is_grad_enabled(), backend)[0]
    if backend == "mamba-ssm":
        return _mamba_ssm_scan()(*arguments)
    return bidirectional_scan_in_parts(backend, *arguments)


def bidirectional_scan_in_parts(
    backend: str,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_scale: Tensor | None = None,
) -> Tensor:
    """As `bidirectional_scan`, by one operator after the other, on this backend, which can be any."""
    x, z = xz.chunk(2, dim=-1)
    x = conv_on(backend, x, conv_weight, conv_bias)  # (G, B, T, E)
    chosen = torch.bmm(x.flatten(1, 2), x_proj.mT)
    low_rank_dt, B, C = _split(chosen, x, A)
    dt = torch.bmm(low_rank_dt, dt_proj.mT).view(x.shape)
    return scan_on(backend, x, dt, A, B, C, D, z, dt_bias, dt_scale)


def _split(chosen: Tensor, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low-rank dt (G, B*T, R), B and C (G, B, T, N)."""
    state_size = A.shape[-1]
    low_rank_dt, B, C = chosen.split([chosen.shape[-1] - 2 * state_size, state_size, state_size], dim=-1)
    return low_rank_dt, B.unflatten(1, x.shape[1:3]), C.unflatten(1, x.shape[1:3])


def _split_for_kernels(backend: str, chosen: Tensor, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_split`, with B and C as the backend's kernels read them.

    Those of numba read float32, and it takes less time to convert all of `chosen` than short parts of its rows.
    """
    low_rank_dt, B, C = _split(chosen, x, A)
    if backend == "numba" and chosen.dtype != torch.float32:
        _, B, C = _split(chosen.float(), x, A)
    return low_rank_dt, B, C


def _time_steps(low_rank_dt: Tensor, dt_proj: Tensor, x: Tensor) -> Tensor:
    """dt (G, B, T, E) before bias and softplus, a temporary tensor."""
    dt = temporary(tuple(x.shape), x.dtype, x.device)
    torch.bmm(low_rank_dt, dt_proj.mT, out=dt.flatten(1, 2))
    return dt


def _product_over_tokens(left: Tensor, right: Tensor, num_parts: int) -> Tensor:
    """(G, B*T, M), (G, B*T, N) -> (G, M, N), the gradient of a projection's weight, added up in parts of the batch."""
    if num_parts == 1:
        return torch.bmm(left.mT, right)
    left, right = (tensor.unflatten(1, (num_parts, -1)).flatten(0, 1) for tensor in (left, right))
    return torch.bmm(left.mT, right).unflatten(0, (-1, num_parts)).sum(1)


def _compute(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_scale: Tensor | None,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, `chosen`, and the states that the backward pass starts from (empty unless `keep_states`)."""
    x, z = xz.chunk(2, dim=-1)
    with temporaries():
        x = conv_kernels(backend).forward(x, conv_weight, conv_bias)
        chosen = torch.bmm(x.flatten(1, 2), x_proj.mT)
        low_rank_dt, B, C = _split_for_kernels(backend, chosen, x, A)
        dt = _time_steps(low_rank_dt, dt_proj, x)
    out, states = scan_kernels(backend).forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states)
    return out, chosen, states


def _shapes(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, dt_scale, keep_states, backend):
    batch_size, num_tokens = xz.shape[:2]
    num_directions, num_chosen, channels = x_proj.shape
    x = xz.new_empty(num_directions, batch_size, num_tokens, channels)
    return (
        xz.new_empty(batch_size, num_tokens, channels),
        xz.new_empty(num_directions, batch_size * num_tokens, num_chosen),
        xz.new_empty(states_shape(backend, x, A, keep_states), dtype=torch.float32),
    )


def _compute_backward(
    dout: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_scale: Tensor | None,
    chosen: Tensor,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A and D."""
    conv = conv_kernels(backend)
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    # One product of so few results would leave most of a GPU idle: with 512 images it took ten times as long
    num_parts = 1 if xz.device.type == "cpu" else math.gcd(xz.shape[0], _GPU_PARTS)
    conv_input, z = xz.chunk(2, dim=-1)
    dxz = xz.new_empty(xz.shape)
    dconv_input, dz = dxz.chunk(2, dim=-1)
    with temporaries():
        x = conv.forward(conv_input, conv_weight, conv_bias)
        low_rank_dt, B, C = _split_for_kernels(backend, chosen, x, A)
        dt = _time_steps(low_rank_dt, dt_proj, x)
        dx, ddt, dA, dB, dC, dD, _, ddt_bias = scan_kernels(backend).backward(
            dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, dz
        )
        del dt
        ddt = ddt.flatten(1, 2).to(xz.dtype)
        # Products of few rows are faster on a CPU than those of few columns
        dlow_rank_dt = torch.bmm(dt_proj.mT, ddt.mT).mT
        dchosen = torch.cat((dlow_rank_dt, dB.flatten(1, 2).to(xz.dtype), dC.flatten(1, 2).to(xz.dtype)), -1)
        ddt_proj = _product_over_tokens(low_rank_dt, ddt, num_parts).mT
        del ddt
        dx_proj = _product_over_tokens(dchosen, x.flatten(1, 2), num_parts)
        dx = dx.to(xz.dtype)
        dx.flatten(1, 2).baddbmm_(dchosen, x_proj)
        _, dconv_weight, dconv_bias = conv.backward(dx, conv_input, conv_weight, conv_bias, dconv_input)
    gradients = (dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD)
    return [gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, inputs)]


def _backward_shapes(dout, *arguments):
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:8]]


_scan_backward = define("bidirectional_scan_backward", _compute_backward, _backward_shapes)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.backend = inputs[10]


def _backward(ctx, dout, *_):
    return *_scan_backward(dout, *ctx.saved_tensors, ctx.backend), None, None, None


_scan = define("bidirectional_scan", _compute, _shapes, _save, _backward)
