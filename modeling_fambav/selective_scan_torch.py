"""The selective scan in plain torch operations: any device, any dtype, no extra package.

Names are those of `selective_scan.py`. On the devices that come here every call of an operation costs time, so there
are few of them: about a hundred for the scan of 197 tokens. Decays and drives of a chunk of steps are computed at
once. Blocks of a few steps then run side by side, each from a state of zero, one operation per step of a block; one
per block carries the state from block to block, and one more gives all blocks what they should have started from.
On a CPU, which has kernels unless it lacks numba, this is the plain loop over steps.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import define

# Steps whose states (steps, G, B, N, E) exist at once, and steps of a block.
_CHUNK_LENGTH = 52
_BLOCK_LENGTH = 4
# On a CPU calls are cheap and memory is slow: a chunk that stays in the cache, one step after the other.
_CPU_CHUNK_BYTES = 2**21


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
        recurrence(*(in_scan_order(tensor) for tensor in (x_, delta)), A, in_scan_order(B), in_scan_order(C))
    )
    return gated_mean(torch.addcmul(y, D[:, None, None, :], x_), z).to(x.dtype)


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


def _recurrence_in_chunks(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C_t h_t for tensors in scan order. Only one chunk of states exists at a time."""
    delta_, drive, rates = _per_step(delta, -2), _per_step(delta * x, -2), _rates(A)
    B_, C_ = _per_step(B, -1), _per_step(C, -2).contiguous()
    decay, states = _chunk_of_states(x, A, 0), _chunk_of_states(x, A, 1)
    states[0] = 0
    y = x.new_empty(x.shape[2], *x.shape[:2], 1, x.shape[3])
    for steps, count in _chunks(x, A):
        _fill_decay(decay[:count], delta_[steps], rates)
        torch.mul(drive[steps], B_[steps], out=states[1 : count + 1])
        _run(decay[:count], states[: count + 1])
        torch.matmul(C_[steps], states[1 : count + 1], out=y[steps])
        states[0] = states[count]
    return y.squeeze(3).permute(1, 2, 0, 3)


def _shapes(x, delta, A, B, C):
    return x.new_empty(x.shape[2], *x.shape[:2], x.shape[3]).permute(1, 2, 0, 3)


def _compute_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C.

    The adjoint g_t of the state runs backwards through time: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""
    delta_, drive, dy_ = _per_step(delta, -2), _per_step(delta * x, -2), _per_step(dy, -2)
    B_, C_, rates = _per_step(B, -1), _per_step(C, -1), _rates(A)
    chunks = list(_chunks(x, A))
    # The decays of a chunk and of the step after it, and a copy to work in
    decay, products = _chunk_of_states(x, A, 1), _chunk_of_states(x, A, 0)
    states, adjoint = _chunk_of_states(x, A, 1), _chunk_of_states(x, A, 1)

    entries = [torch.zeros_like(states[0])]
    for steps, count in chunks[:-1]:
        _fill_decay(products[:count], delta_[steps], rates)
        torch.mul(drive[steps], B_[steps], out=states[1 : count + 1])
        states[0] = entries[-1]
        _run(products[:count], states[: count + 1])
        entries.append(states[count].clone())

    dx, ddelta, dB, dC = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
    # Of every image: a sum over steps and images at once is slow on CPUs
    dA = torch.zeros_like(states[0])
    next_decay = next_adjoint = torch.zeros_like(states[0])
    for (steps, count), entry in zip(reversed(chunks), reversed(entries)):
        _fill_decay(decay[:count], delta_[steps], rates)
        decay[count] = next_decay
        torch.mul(drive[steps], B_[steps], out=states[1 : count + 1])
        states[0] = entry
        _run(_to_spend(decay[:count], products), states[: count + 1])
        torch.mul(dy_[steps], C_[steps], out=adjoint[:count])
        adjoint[count] = next_adjoint
        _run(_to_spend(decay[1 : count + 1], products), adjoint[: count + 1], backwards=True)
        next_decay, next_adjoint = decay[0].clone(), adjoint[0].clone()

        g = adjoint[:count]
        _steps_of(dC, steps).copy_(torch.matmul(states[1 : count + 1], dy_[steps].mT).squeeze(-1))
        _steps_of(dB, steps).copy_(torch.matmul(g, drive[steps].mT).squeeze(-1))
        d_drive = torch.matmul(B_[steps].mT, g).squeeze(-2)
        d_exponent = g.mul_(states[:count]).mul_(decay[:count])  # gradient of delta_t A
        # The rates hold A by log(2)
        d_delta = torch.mul(d_exponent, rates, out=products[:count]).sum(-2).mul_(math.log(2))
        _steps_of(dx, steps).copy_(d_drive * _steps_of(delta, steps))
        _steps_of(ddelta, steps).copy_(torch.addcmul(d_delta, d_drive, _steps_of(x, steps)))
        dA += torch.mul(d_exponent, delta_[steps], out=products[:count]).sum(0)
    return dx, ddelta, dA.sum(1).mT.contiguous(), dB, dC


def _backward_shapes(dy, x, delta, A, B, C):
    return tuple(torch.empty_like(tensor) for tensor in (x, delta, A, B, C))


_recurrence_backward = define("recurrence_backward", _compute_backward, _backward_shapes)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _recurrence_backward(dy, *ctx.saved_tensors)


# An operator, so that torch.compile does not unroll the loop over time; its backward pass computes the states again.
recurrence = define("recurrence", _recurrence_in_chunks, _shapes, _save, _backward)


def _chunk_length(x: Tensor, A: Tensor) -> int:
    if _in_blocks(x):
        return min(_CHUNK_LENGTH, x.shape[2])
    step_bytes = x[:, :, 0].numel() * A.shape[2] * x.itemsize
    return min(max(1, _CPU_CHUNK_BYTES // max(1, step_bytes)), x.shape[2])


def _chunks(x: Tensor, A: Tensor) -> Iterator[tuple[slice, int]]:
    """The steps of every chunk, and how many they are."""
    num_tokens, length = x.shape[2], _chunk_length(x, A)
    for start in range(0, num_tokens, length):
        end = min(start + length, num_tokens)
        yield slice(start, end), end - start


def _per_step(tensor: Tensor, dim: int) -> Tensor:
    """(G, B, T, ...) to (T, G, B, ...) with one more dimension: time first, so that a step is contiguous."""
    return tensor.permute(2, 0, 1, 3).unsqueeze(dim)


def _steps_of(tensor: Tensor, steps: slice) -> Tensor:
    """Steps of (G, B, T, ...), time first."""
    return tensor[:, :, steps].permute(2, 0, 1, 3)


def _chunk_of_states(x: Tensor, A: Tensor, more: int) -> Tensor:
    """Memory for something of the states of a chunk and so many steps more: (steps, G, B, N, E)."""
    num_directions, batch_size, _, channels = x.shape
    return x.new_empty(_chunk_length(x, A) + more, num_directions, batch_size, A.shape[2], channels)


def _fill_decay(decay: Tensor, delta: Tensor, rates: Tensor) -> None:
    """exp(delta A) for delta (T, G, B, 1, E) and rates (G, 1, N, E), A by the logarithm of 2."""
    # Powers of two, which CPUs compute three times as fast
    torch.mul(delta, rates, out=decay).exp2_()


def _to_spend(decay: Tensor, memory: Tensor) -> Tensor:
    """Decays for `_run`, which leaves the ones given as they are."""
    return memory[: decay.shape[0]].copy_(decay) if _in_blocks(decay) else decay


def _in_blocks(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _rates(A: Tensor) -> Tensor:
    return (A.mT * math.log2(math.e)).contiguous().unsqueeze(1)


def _run(decay: Tensor, states: Tensor, backwards: bool = False) -> None:
    """Replace drives by states: h_t = decay_t h_{t-1} + drive_t. Overwrites the decays if they run in blocks.

    Args:
        decay: (T, ...).
        states: (T + 1, ...): the state before the first step, and a drive per step. If `backwards`, a drive per step
            and the state after the last one, for h_t = decay_t h_{t+1} + drive_t.
    """
    num_steps = decay.shape[0]
    num_blocks = num_steps // _BLOCK_LENGTH if _in_blocks(decay) else 0
    in_blocks = num_blocks * _BLOCK_LENGTH
    if num_blocks:
        _run_blocks(decay, states, num_blocks, backwards)
    here, decays = states.unbind(), decay.unbind()
    if backwards:
        for step in reversed(range(num_steps - in_blocks)):
            here[step].addcmul_(decays[step], here[step + 1])
    else:
        for step in range(in_blocks, num_steps):
            here[step + 1].addcmul_(decays[step], here[step])


def _run_blocks(decay: Tensor, states: Tensor, num_blocks: int, backwards: bool) -> None:
    """`_run` for the first blocks; for the last ones if `backwards`."""
    length, order, blocks = num_blocks * _BLOCK_LENGTH, range(_BLOCK_LENGTH), range(num_blocks)
    if backwards:
        order, blocks, unfinished = order[::-1], blocks[::-1], slice(1, None)
        run, decay = states[-1 - length : -1], decay[-length:]
        entries = states[-1 - length :][_BLOCK_LENGTH::_BLOCK_LENGTH]
    else:
        unfinished = slice(0, -1)
        run, decay = states[1 : length + 1], decay[:length]
        entries = states[:length:_BLOCK_LENGTH]
    run, decay = (tensor.unflatten(0, (num_blocks, _BLOCK_LENGTH)) for tensor in (run, decay))
    for before, step in pairwise(order):
        run[:, step].addcmul_(decay[:, step], run[:, before])
        decay[:, step].mul_(decay[:, before])  # now that since the block began
    last = order[-1]
    for block in blocks:
        run[block, last].addcmul_(decay[block, last], entries[block])
    run[:, unfinished].addcmul_(decay[:, unfinished], entries.unsqueeze(1))
