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

`selective_scan` and `causal_conv1d` are the API. They choose a backend by device and by what is installed;
`selective_scan_backend` tells which.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Time steps whose states (G, B, steps, E, N) the torch path holds at once.
_CHUNK_LENGTH = 32


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
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    scan = _scan_mamba_ssm if selective_scan_backend(x) == "mamba-ssm" else _scan_torch
    return _gate(scan(x, dt, A, B, C, D, dt_bias, dt_scale), z).to(x.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU in every direction; the backward one looks ahead instead of back.

    Args:
        x (`Tensor` of shape `(B, T, E)`): input, shared by the directions.
        weight (`Tensor` of shape `(G, E, K)`): the last tap belongs to the current token.
        bias (`Tensor` of shape `(G, E)`).

    Returns:
        `Tensor` of shape `(G, B, T, E)`.
    """
    num_tokens, kernel_size = x.shape[1], weight.shape[-1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    outputs = []
    for direction in range(weight.shape[0]):
        taps = weight[direction]
        if direction == 0:
            padded = F.pad(x, (0, 0, kernel_size - 1, 0))
        else:
            padded = F.pad(x, (0, 0, 0, kernel_size - 1))
            taps = taps.flip(-1)
        output = bias[direction].expand_as(x)
        for tap in range(kernel_size):
            output = torch.addcmul(output, padded[:, tap : tap + num_tokens], taps[:, tap])
        outputs.append(output)
    return F.silu(torch.stack(outputs))


def selective_scan_backend(tensor: Tensor) -> str:
    """Name of the backend that scans a tensor like this one: `"mamba-ssm"` or `"torch"`."""
    if tensor.is_cuda:
        if _mamba_ssm_scan() is not None and tensor.dtype != torch.float64:
            return "mamba-ssm"
        logger.warning_once(
            "Famba-V scans with plain torch operations on the GPU, which is slow. "
            "`pip install mamba-ssm causal-conv1d` provides compiled kernels."
        )
    return "torch"


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
    delta = _time_steps(dt, dt_bias, dt_scale)
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
    return _gate(torch.stack(outputs), z).to(x.dtype), torch.stack(last_states)


# ---- what all backends share ----


def _check_shapes(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> None:
    if x.dim() != 4 or not 1 <= x.shape[0] <= 2 or x.shape[2] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (1 or 2 directions, batch, tokens >= 1, channels)")
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size = A.shape[-1]
    expected = {
        "dt": (dt, (num_directions, batch_size, num_tokens, channels)),
        "A": (A, (num_directions, channels, state_size)),
        "B": (B, (num_directions, batch_size, num_tokens, state_size)),
        "C": (C, (num_directions, batch_size, num_tokens, state_size)),
        "D": (D, (num_directions, channels)),
        "z": (z, (batch_size, num_tokens, channels)),
        "dt_bias": (dt_bias, (num_directions, channels)),
        "dt_scale": (dt_scale, (batch_size, num_tokens)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape} beside x {tuple(x.shape)}")


def _time_steps(dt: Tensor, dt_bias: Tensor | None, dt_scale: Tensor | None) -> Tensor:
    """delta (G, B, T, E) in float32 (float64 for float64 inputs)."""
    delta = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        delta = delta + dt_bias[:, None, None, :]
    delta = F.softplus(delta)
    return delta if dt_scale is None else delta * dt_scale.detach().unsqueeze(-1)


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    """silu(z) * mean over directions: (G, B, T, E), (B, T, E) -> (B, T, E)."""
    y = y.mean(dim=0)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _in_scan_order(tensor: Tensor) -> Tensor:
    """(G, B, T, ...): turn the backward direction round, so that every direction runs from first to last.

    Its own inverse."""
    return torch.cat((tensor[:1], tensor[1:].flip(2)))


# ---- backend "torch" ----


def _scan_torch(x, dt, A, B, C, D, dt_bias, dt_scale) -> Tensor:
    """(G, B, T, E) in float32: y of each direction at the positions of the sequence."""
    delta = _time_steps(dt, dt_bias, dt_scale)
    x, A, B, C, D = (tensor.to(delta.dtype) for tensor in (x, A, B, C, D))
    x_, delta_, B, C = (_in_scan_order(tensor) for tensor in (x, delta, B, C))
    return _in_scan_order(_recurrence(x_, delta_, A, B, C)) + D[:, None, None, :] * x


@torch.library.custom_op("fambav::recurrence", mutates_args=())
def _recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C_t h_t for tensors in scan order. An operator, so that torch.compile does not unroll the loop over time.

    Only one chunk of states exists at a time; the backward pass computes them again."""
    state = x.new_zeros(_state_shape(x, A))
    y = torch.empty_like(x)
    for steps in _chunks(x.shape[2]):
        states, _ = _states(x[:, :, steps], delta[:, :, steps], A, B[:, :, steps], state)
        y[:, :, steps] = _read_out(states, C[:, :, steps])
        state = states[-1]
    return y


@_recurrence.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fambav::recurrence_backward", mutates_args=())
def _recurrence_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C.

    The adjoint g_t of the state runs backwards through time: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""
    chunks = list(_chunks(x.shape[2]))
    entry_states = [x.new_zeros(_state_shape(x, A))]
    for steps in chunks[:-1]:
        states, _ = _states(x[:, :, steps], delta[:, :, steps], A, B[:, :, steps], entry_states[-1])
        entry_states.append(states[-1].clone())

    dx, ddelta, dA, dB, dC = (torch.empty_like(x), torch.empty_like(delta), torch.zeros_like(A)) + (
        torch.empty_like(B),
        torch.empty_like(C),
    )
    carried = x.new_zeros(_state_shape(x, A))  # exp(delta_{t+1} A) g_{t+1}
    for steps, entry_state in zip(reversed(chunks), reversed(entry_states)):
        x_c, delta_c, B_c, C_c, dy_c = (tensor[:, :, steps] for tensor in (x, delta, B, C, dy))
        states, decay = _states(x_c, delta_c, A, B_c, entry_state)
        previous = torch.cat((entry_state.unsqueeze(0), states[:-1]))

        adjoint = torch.einsum("gbte,gbtn->tgben", dy_c, C_c).contiguous()
        for t in reversed(range(adjoint.shape[0])):
            adjoint[t] += carried
            torch.mul(decay[t], adjoint[t], out=carried)

        dC[:, :, steps] = torch.einsum("tgben,gbte->gbtn", states, dy_c)
        dB[:, :, steps] = torch.einsum("tgben,gbte->gbtn", adjoint, delta_c * x_c)
        d_drive = torch.einsum("tgben,gbtn->gbte", adjoint, B_c)
        d_exponent = adjoint.mul_(previous).mul_(decay)  # gradient of delta_t A
        dx[:, :, steps] = d_drive * delta_c
        ddelta[:, :, steps] = d_drive * x_c + torch.einsum("tgben,gen->gbte", d_exponent, A)
        dA += torch.einsum("tgben,gbte->gen", d_exponent, delta_c)
    return dx, ddelta, dA, dB, dC


@_recurrence_backward.register_fake
def _(dy, x, delta, A, B, C):
    return tuple(torch.empty_like(tensor) for tensor in (x, delta, A, B, C))


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_recurrence.register_autograd(
    lambda ctx, dy: _recurrence_backward(dy, *ctx.saved_tensors), setup_context=_save_inputs
)


def _chunks(num_tokens: int) -> list[slice]:
    return [slice(start, start + _CHUNK_LENGTH) for start in range(0, num_tokens, _CHUNK_LENGTH)]


def _state_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[1], x.shape[3], A.shape[2])


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States after every step, and the decay of every step, time first so that one step is contiguous: (T,G,B,E,N)."""
    decay = torch.exp_(torch.einsum("gbte,gen->tgben", delta, A).contiguous())
    states = torch.einsum("gbte,gbtn->tgben", delta * x, B).contiguous()
    for t in range(states.shape[0]):
        state = states[t].addcmul_(decay[t], state)
    return states, decay


def _read_out(states: Tensor, C: Tensor) -> Tensor:
    """C_t h_t: (T, G, B, E, N), (G, B, T, N) -> (G, B, T, E)."""
    return torch.einsum("tgben,gbtn->gbte", states, C)


# ---- backend "mamba-ssm" ----


@functools.cache
def _mamba_ssm_scan():
    """mamba-ssm's compiled scan, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def _scan_mamba_ssm(x, dt, A, B, C, D, dt_bias, dt_scale) -> Tensor:
    """As `_scan_torch`. The kernel wants (B, channels, T); the directions are stacked on the channels, and B and C
    form one group per direction, so that one launch scans them all."""
    softplus_in_kernel = dt_scale is None
    if not softplus_in_kernel:
        dt, dt_bias = _time_steps(dt, dt_bias, dt_scale), None

    def to_kernel(tensor: Tensor) -> Tensor:
        return _in_scan_order(tensor).permute(1, 0, 3, 2).to(x.dtype).contiguous()  # (B, G, channels, T)

    y = _mamba_ssm_scan()(
        to_kernel(x).flatten(1, 2),
        to_kernel(dt).flatten(1, 2),
        A.float().flatten(0, 1),
        to_kernel(B),
        to_kernel(C),
        D.float().flatten(),
        delta_bias=None if dt_bias is None else dt_bias.float().flatten(),
        delta_softplus=softplus_in_kernel,
    )
    y = y.unflatten(1, (x.shape[0], -1)).permute(1, 0, 3, 2)  # (G, B, T, E)
    return _in_scan_order(y).float()
