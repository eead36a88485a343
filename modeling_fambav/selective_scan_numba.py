"""CPU kernels of the selective scan and of the convolution before it, compiled by numba at first use.

One call does all directions and everything around the scan: bias, softplus and scale of the time steps, skip
connection, gate and mean. Tensors are channels-last, and the backward direction walks through time from the end, so
nothing is flipped, transposed or copied. Names are those of `selective_scan.py`; in the kernels

    tensors are 2-D: (G*B*T, E) or (G*B*T, N) or (B*T, E), row by row, with any distance between rows
    A is (G*N, E) and multiplied by log2(e), so that the decay is exp2(delta * A)
    a task is one image and one block of channels; it owns its outputs, so threads share nothing and the results do
    not depend on their number. Sums over images or blocks are left to the caller.
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence

The forward pass keeps the states at the start of every chunk of time; the backward pass computes those in between
again, one chunk at a time.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .numba_vectors import LANES, exp2, full, load, njit, reduce_sum, sigmoid, softplus, store, types

# Channels of one task: four vectors, so that a step reads runs of whole cache lines.
_BLOCK = 64
# Steps between kept states. The states and decays of one chunk of a task fit the second-level cache.
_CHUNK = 64

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def _kernel(signature):
    """Compile for one signature, whatever the memory layout of the arguments, and keep the result on disk."""
    return njit(signature, nogil=True, cache=True, error_model="numpy")


_matrix = types.float32[:, :]
_vector = types.float32[:]
_shape = types.UniTuple(types.intp, 5)
_range = (types.intp, types.intp)

_inlined = njit(inline="always", error_model="numpy")


@_inlined
def _position(g, i, num_tokens):
    return i if g == 0 else num_tokens - 1 - i


@_inlined
def _delta(dt, dt_bias, dt_scale, row, image_row, g, e):
    return softplus(load(dt, row, e) + load(dt_bias, g, e)) * full(dt_scale[image_row])


@_kernel(types.void(*[_matrix] * 8, _vector, *[_matrix] * 2, _shape, *_range))
def _scan_forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, out, states, shape, first_task, last_task):
    num_directions, batch_size, num_tokens, channels, state_size = shape
    num_blocks = (channels + _BLOCK - 1) // _BLOCK
    num_chunks = (num_tokens + _CHUNK - 1) // _CHUNK
    keeps_states, is_gated = states.shape[0] > 0, z.shape[0] > 0
    share = np.float32(1.0) / np.float32(num_directions)
    h = np.empty((state_size, _BLOCK), np.float32)
    for task in range(first_task, last_task):
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        stop = min(start + _BLOCK, channels)
        for g in range(num_directions):
            h[:] = 0.0
            for i in range(num_tokens):
                t = _position(g, i, num_tokens)
                image_row = b * num_tokens + t
                row = g * batch_size * num_tokens + image_row
                if keeps_states and i % _CHUNK == 0:
                    kept = ((g * batch_size + b) * num_chunks + i // _CHUNK) * state_size
                    for n in range(state_size):
                        for e in range(start, stop, LANES):
                            store(states, kept + n, e, load(h, n, e - start))
                for e in range(start, stop, LANES):
                    x_t = load(x, row, e)
                    delta = _delta(dt, dt_bias, dt_scale, row, image_row, g, e)
                    drive = delta * x_t
                    y = load(D, g, e) * x_t
                    for n in range(state_size):
                        decay = exp2(delta * load(A, g * state_size + n, e))
                        h_n = decay * load(h, n, e - start) + drive * full(B[row, n])
                        store(h, n, e - start, h_n)
                        y = y + h_n * full(C[row, n])
                    if g > 0:
                        y = y + load(out, image_row, e)
                    if g == num_directions - 1:
                        y = y * full(share)
                        if is_gated:
                            gate = load(z, image_row, e)
                            y = y * gate * sigmoid(gate)
                    store(out, image_row, e, y)


@_kernel(types.void(*[_matrix] * 9, _vector, _matrix, _shape, *[_matrix] * 8, *_range))
def _scan_backward(
    dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, shape,
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, first_task, last_task,
):  # fmt: skip
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    num_directions, batch_size, num_tokens, channels, state_size = shape
    num_blocks = (channels + _BLOCK - 1) // _BLOCK
    num_chunks = (num_tokens + _CHUNK - 1) // _CHUNK
    is_gated = z.shape[0] > 0
    share = np.float32(1.0) / np.float32(num_directions)
    log_2 = np.float32(np.log(2.0))
    # h[i] is the state before step i of the chunk, h[i + 1] the one after it
    h = np.empty(((_CHUNK + 1) * state_size, _BLOCK), np.float32)
    decays = np.empty((_CHUNK * state_size, _BLOCK), np.float32)
    deltas = np.empty((_CHUNK, _BLOCK), np.float32)
    carried = np.empty((state_size, _BLOCK), np.float32)  # decay_{t+1} g_{t+1}
    dB_t = np.empty((state_size, LANES), np.float32)
    dC_t = np.empty((state_size, LANES), np.float32)
    for task in range(first_task, last_task):
        b, block = task // num_blocks, task % num_blocks
        start = block * _BLOCK
        stop = min(start + _BLOCK, channels)
        for g in range(num_directions):
            carried[:] = 0.0
            image_direction = b * num_directions + g
            for n in range(state_size):
                for e in range(start, stop, LANES):
                    store(dA, image_direction * state_size + n, e, full(_ZERO))
            for e in range(start, stop, LANES):
                store(dD, image_direction, e, full(_ZERO))
                store(ddt_bias, image_direction, e, full(_ZERO))

            for chunk in range(num_chunks - 1, -1, -1):
                first = chunk * _CHUNK
                steps = min(_CHUNK, num_tokens - first)

                kept = ((g * batch_size + b) * num_chunks + chunk) * state_size
                for n in range(state_size):
                    for e in range(start, stop, LANES):
                        store(h, n, e - start, load(states, kept + n, e))
                for i in range(steps):
                    image_row = b * num_tokens + _position(g, first + i, num_tokens)
                    row = g * batch_size * num_tokens + image_row
                    for e in range(start, stop, LANES):
                        c = e - start
                        delta = _delta(dt, dt_bias, dt_scale, row, image_row, g, e)
                        store(deltas, i, c, delta)
                        drive = delta * load(x, row, e)
                        for n in range(state_size):
                            decay = exp2(delta * load(A, g * state_size + n, e))
                            store(decays, i * state_size + n, c, decay)
                            h_n = decay * load(h, i * state_size + n, c) + drive * full(B[row, n])
                            store(h, (i + 1) * state_size + n, c, h_n)

                for i in range(steps - 1, -1, -1):
                    image_row = b * num_tokens + _position(g, first + i, num_tokens)
                    row = g * batch_size * num_tokens + image_row
                    for n in range(state_size):
                        store(dB_t, n, 0, full(_ZERO))
                        store(dC_t, n, 0, full(_ZERO))
                    for e in range(start, stop, LANES):
                        c = e - start
                        dout_t = load(dout, image_row, e) * full(share)
                        gate, gate_sigmoid, dy = full(_ONE), full(_ONE), dout_t
                        if is_gated:
                            gate = load(z, image_row, e)
                            gate_sigmoid = sigmoid(gate)
                            dy = dout_t * gate * gate_sigmoid
                        x_t, delta, skip = load(x, row, e), load(deltas, i, c), load(D, g, e)
                        drive = delta * x_t
                        y, d_drive, d_delta = skip * x_t, full(_ZERO), full(_ZERO)
                        for n in range(state_size):
                            A_n = load(A, g * state_size + n, e)
                            after = load(h, (i + 1) * state_size + n, c)
                            adjoint = load(carried, n, c) + dy * full(C[row, n])
                            y = y + after * full(C[row, n])
                            store(dC_t, n, 0, load(dC_t, n, 0) + dy * after)
                            store(dB_t, n, 0, load(dB_t, n, 0) + adjoint * drive)
                            d_drive = d_drive + adjoint * full(B[row, n])
                            adjoint = adjoint * load(decays, i * state_size + n, c)
                            store(carried, n, c, adjoint)
                            d_exponent = adjoint * load(h, i * state_size + n, c)
                            d_delta = d_delta + d_exponent * A_n
                            dA_row = image_direction * state_size + n
                            store(dA, dA_row, e, load(dA, dA_row, e) + d_exponent * delta)
                        # A holds A log2(e), so its product with delta comes back by log(2)
                        d_delta = d_delta * full(log_2) + d_drive * x_t
                        store(dx, row, e, d_drive * delta + dy * skip)
                        store(dD, image_direction, e, load(dD, image_direction, e) + dy * x_t)
                        slope = sigmoid(load(dt, row, e) + load(dt_bias, g, e)) * full(dt_scale[image_row])
                        d_dt = d_delta * slope
                        store(ddt, row, e, d_dt)
                        store(ddt_bias, image_direction, e, load(ddt_bias, image_direction, e) + d_dt)
                        if is_gated:
                            # d silu(z) / dz = s (1 + z (1 - s))
                            d_gate = dout_t * y * gate_sigmoid * (full(_ONE) + gate * (full(_ONE) - gate_sigmoid))
                            if g > 0:
                                d_gate = d_gate + load(dz, image_row, e)
                            store(dz, image_row, e, d_gate)
                    partial = block * num_directions * batch_size * num_tokens + row
                    for n in range(state_size):
                        dB[partial, n] = reduce_sum(load(dB_t, n, 0))
                        dC[partial, n] = reduce_sum(load(dC_t, n, 0))


@_inlined
def _convolved(x, weight, bias, g, b, t, e, num_tokens, kernel_size):
    """Before the SiLU. Tap k of the forward direction sees position t - (K - 1) + k, the backward one's mirror it."""
    total = load(bias, g, e)
    for k in range(kernel_size):
        distance = kernel_size - 1 - k
        source = t - distance if g == 0 else t + distance
        if 0 <= source < num_tokens:
            total = total + load(x, b * num_tokens + source, e) * load(weight, g * kernel_size + k, e)
    return total


@_kernel(types.void(*[_matrix] * 4, _shape, *_range))
def _conv_forward(x, weight, bias, out, shape, first_task, last_task):
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    num_blocks = (channels + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        for t in range(num_tokens):
            for g in range(num_directions):
                for e in range(start, min(start + _BLOCK, channels), LANES):
                    u = _convolved(x, weight, bias, g, b, t, e, num_tokens, kernel_size)
                    store(out, (g * batch_size + b) * num_tokens + t, e, u * sigmoid(u))


@_kernel(types.void(*[_matrix] * 4, _shape, *[_matrix] * 3, *_range))
def _conv_backward(dout, x, weight, bias, shape, dx, dweight, dbias, first_task, last_task):
    """Gradients. dweight (B*G*K, E) and dbias (B*G, E) are per image. All three start as zeros."""
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    num_blocks = (channels + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        for t in range(num_tokens):
            for g in range(num_directions):
                image_direction = b * num_directions + g
                for e in range(start, min(start + _BLOCK, channels), LANES):
                    u = _convolved(x, weight, bias, g, b, t, e, num_tokens, kernel_size)
                    s = sigmoid(u)
                    du = load(dout, (g * batch_size + b) * num_tokens + t, e)
                    du = du * s * (full(_ONE) + u * (full(_ONE) - s))
                    store(dbias, image_direction, e, load(dbias, image_direction, e) + du)
                    for k in range(kernel_size):
                        distance = kernel_size - 1 - k
                        source = t - distance if g == 0 else t + distance
                        if 0 <= source < num_tokens:
                            row, tap = b * num_tokens + source, image_direction * kernel_size + k
                            store(dx, row, e, load(dx, row, e) + du * load(weight, g * kernel_size + k, e))
                            store(dweight, tap, e, load(dweight, tap, e) + du * load(x, row, e))


# ---- threads ----

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """A forked process has none of its parent's threads, and perhaps a lock that nobody will release."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="fambav-scan")
        return _pool


def _run(kernel, arguments: list, num_tasks: int) -> None:
    """Run all tasks on `torch.get_num_threads()` threads, this one included. Kernels do not hold the GIL.

    Plain threads, because numba's own either may not be forked or may not be called from two threads at once."""
    num_threads = min(torch.get_num_threads(), num_tasks)
    # Two pieces a thread, taken in turn, so that a thread that is held up leaves its second one to the others.
    piece = -(-num_tasks // (2 * num_threads)) if num_threads > 1 else num_tasks
    starts = iter(range(0, num_tasks, piece))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                first = next(starts, None)
            if first is None:
                return
            kernel(*arguments, first, min(first + piece, num_tasks))

    others = [_threads().submit(work) for _ in range(num_threads - 1)]
    work()
    for other in others:
        other.result()


# ---- tensors in, tensors out ----


def _rows(tensor: Tensor) -> np.ndarray:
    """Everything but the last dimension as rows; a view wherever the strides allow it."""
    tensor = tensor.detach().float()
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[-1]).numpy()


def _pad_channels(tensor: Tensor) -> Tensor:
    """Zeros up to a whole number of vectors; the padded channels stay zero all the way."""
    missing = -tensor.shape[-1] % LANES
    return F.pad(tensor, (0, missing)) if missing else tensor


def _num_tasks(batch_size: int, channels: int) -> int:
    return batch_size * -(-channels // _BLOCK)


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The arguments that both kernels begin with, and the shape that they end with."""
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size = A.shape[-1]
    if z is None:
        z = x.new_empty(0, num_tokens, channels)
    if dt_bias is None:
        dt_bias = D.new_zeros(num_directions, channels)
    if dt_scale is None:
        dt_scale = x.new_ones(batch_size, num_tokens)
    x, dt, D, z, dt_bias = (_rows(_pad_channels(tensor)) for tensor in (x, dt, D, z, dt_bias))
    A = _rows(_pad_channels(A.float().mT * float(np.log2(np.e))))
    scale = dt_scale.detach().float().reshape(-1).numpy()
    shape = (num_directions, batch_size, num_tokens, x.shape[-1], state_size)
    return [x, dt, A, _rows(B), _rows(C), D, z, dt_bias, scale], shape


def states_shape(x: Tensor, A: Tensor, keep_states: bool) -> tuple[int, int]:
    """Shape of the states that `scan_forward` keeps: (G * B * chunks * N, padded channels)."""
    num_directions, batch_size, num_tokens, channels = x.shape
    num_chunks = -(-num_tokens // _CHUNK) if keep_states else 0
    return num_directions * batch_size * num_chunks * A.shape[-1], -(-channels // LANES) * LANES


def scan_forward(
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
) -> tuple[Tensor, Tensor]:
    """`selective_scan` without gradients.

    Returns:
        the output `(B, T, E)`, and the float32 states at the start of every chunk, which `scan_backward` needs; empty
        unless `keep_states`.
    """
    inputs, shape = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    _, batch_size, num_tokens, channels, _ = shape
    states = torch.empty(states_shape(x, A, keep_states))
    out = torch.empty(batch_size * num_tokens, channels)
    _run(_scan_forward, [*inputs, out.numpy(), states.numpy(), shape], _num_tasks(batch_size, channels))
    return out[:, : x.shape[-1]].reshape(batch_size, num_tokens, -1).to(x.dtype), states


def scan_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z and dt_bias, in float32; those of an absent z or dt_bias are empty or zero."""
    inputs, shape = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    num_directions, batch_size, num_tokens, channels, state_size = shape
    rows, num_blocks = num_directions * batch_size * num_tokens, -(-channels // _BLOCK)
    dx, ddt = torch.empty(rows, channels), torch.empty(rows, channels)
    dA = torch.empty(batch_size * num_directions * state_size, channels)
    dB, dC = torch.empty(num_blocks * rows, state_size), torch.empty(num_blocks * rows, state_size)
    dD, ddt_bias = (torch.empty(batch_size * num_directions, channels) for _ in range(2))
    dz = torch.empty(batch_size * num_tokens if z is not None else 0, channels)
    outputs = [tensor.numpy() for tensor in (dx, ddt, dA, dB, dC, dD, dz, ddt_bias)]
    arguments = [_rows(_pad_channels(dout)), *inputs, states.numpy(), shape, *outputs]
    _run(_scan_backward, arguments, _num_tasks(batch_size, channels))

    def whole(tensor: Tensor, *leading: int) -> Tensor:
        return tensor[..., : x.shape[-1]].reshape(*leading, x.shape[-1])

    images = (batch_size, num_directions)
    return (
        whole(dx, *x.shape[:3]),
        whole(ddt, *x.shape[:3]),
        whole(dA, *images, state_size).sum(0).mT,
        dB.view(num_blocks, *B.shape).sum(0),
        dC.view(num_blocks, *C.shape).sum(0),
        whole(dD, *images).sum(0),
        whole(dz, -1, num_tokens),
        whole(ddt_bias, *images).sum(0),
    )


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[np.ndarray], tuple[int, ...]]:
    inputs = [_rows(_pad_channels(tensor)) for tensor in (x, weight.mT, bias)]
    return inputs, (weight.shape[0], *x.shape[:2], inputs[0].shape[-1], weight.shape[-1])


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, _ = shape
    out = torch.empty(num_directions * batch_size * num_tokens, channels)
    _run(_conv_forward, [*inputs, out.numpy(), shape], _num_tasks(batch_size, channels))
    return out[:, : x.shape[-1]].reshape(num_directions, *x.shape).to(x.dtype)


def conv_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in float32."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    dx = torch.zeros(batch_size * num_tokens, channels)
    dweight = torch.zeros(batch_size * num_directions * kernel_size, channels)
    dbias = torch.zeros(batch_size * num_directions, channels)
    outputs = [tensor.numpy() for tensor in (dx, dweight, dbias)]
    arguments = [_rows(_pad_channels(dout)), *inputs, shape, *outputs]
    _run(_conv_backward, arguments, _num_tasks(batch_size, channels))
    dweight = dweight.view(batch_size, num_directions, kernel_size, channels).sum(0)
    dbias = dbias.view(batch_size, num_directions, channels).sum(0)
    width = x.shape[-1]
    return dx[:, :width].reshape(x.shape), dweight[..., :width].mT, dbias[:, :width]
