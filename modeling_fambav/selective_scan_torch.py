"""The selective scan and the causal convolution in plain torch operations: any device, any dtype, no extra package.

Names are those of `selective_scan.py`. The scan is linear in the state, so every factor of every step of a chunk is
computed at once, and the loop over time is one fused multiply-add per step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Time steps whose states (steps, G, B, E, N) exist at once.
_CHUNK_LENGTH = 32


def scan(
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
    """As `selective_scan`, with gradients by autograd."""
    delta = time_steps(dt, dt_bias, dt_scale)
    x_, A, B, C, D = (tensor.to(delta.dtype) for tensor in (x, A, B, C, D))
    y = in_scan_order(
        _recurrence(*(in_scan_order(tensor) for tensor in (x_, delta)), A, in_scan_order(B), in_scan_order(C))
    )
    return gated_mean(y + D[:, None, None, :] * x_, z).to(x.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `causal_conv1d`, with gradients by autograd. One shifted multiply-add per tap, in float32 or wider."""
    dtype, num_tokens, kernel_size = x.dtype, x.shape[1], weight.shape[-1]
    x, weight, bias = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (x, weight, bias))
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
    return F.silu(torch.stack(outputs)).to(dtype)


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_scale: Tensor | None) -> Tensor:
    """delta (G, B, T, E) in float32 (float64 for float64 inputs)."""
    delta = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        delta = delta + dt_bias[:, None, None, :]
    delta = F.softplus(delta)
    return delta if dt_scale is None else delta * dt_scale.detach().unsqueeze(-1)


def gated_mean(y: Tensor, z: Tensor | None) -> Tensor:
    """silu(z) * mean over directions: (G, B, T, E), (B, T, E) -> (B, T, E)."""
    y = y.mean(dim=0)
    return y if z is None else y * F.silu(z.to(y.dtype))


def in_scan_order(tensor: Tensor) -> Tensor:
    """(G, B, T, ...): turn the backward direction round, so that every direction runs from first to last.

    Its own inverse."""
    return torch.cat((tensor[:1], tensor[1:].flip(2)))


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


_recurrence.register_autograd(lambda ctx, dy: _recurrence_backward(dy, *ctx.saved_tensors), setup_context=_save_inputs)


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
