"""CPU kernels of the selective scan, compiled by numba at first use.

One call does all directions and everything around the scan: bias, softplus and scale of the time steps, skip
connection, gate and mean. Tensors are channels-last, and the backward direction walks through time from the end, so
nothing is flipped, transposed or copied. Names are those of `selective_scan.py`; in the kernels

    tensors are rows: (G*B*T, E) or (G*B*T, N) or (B*T, E), with any distance between rows
    those with a value per token and channel are float32 or bfloat16, all others float32; all sums are in float32
    A is (G*N, E) and multiplied by log2(e), so that the decay is exp2(delta * A)
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence

The forward pass keeps the states at the start of every chunk of time; the backward pass computes those in between
again, one chunk at a time.

A step is several short loops over the channels rather than a long one: the chain of operations on one vector is long
and the vectors are independent, so a core is busy only if it sees several of them at once.
"""

import numpy as np
import torch
from torch import Tensor

from .causal_conv1d_numba import conv_backward, conv_forward
from .numba_channels import BLOCK, as_rows, as_rows_of_any, ceil_div, launch_blocks, pad_channels, row_dtype
from .numba_jobs import inlined, keep, kernel, next_task, open_job, rows, rows_of_any, scratch, sizes
from .numba_vectors import (
    LANES,
    exp2,
    full,
    load,
    load_scalar,
    reduce_sum,
    sigmoid,
    softplus,
    store,
    store_scalar,
)
from .selective_scan import CHUNK_STEPS, ScanKernels, states_shape

_CHUNK = CHUNK_STEPS["numba"]
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _position(g, i, num_tokens):
    return i if g == 0 else num_tokens - 1 - i


@inlined
def _scaled(value, dt_scale, image_row):
    return value * full(load_scalar(dt_scale, image_row, 0)) if dt_scale[0] != 0 else value


@kernel
def _scan_forward(address):
    job = open_job(address, 11)
    num_directions, batch_size, num_tokens, channels, state_size = sizes(job)
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    x, dt, z, out = rows_of_any(job, 0), rows_of_any(job, 1), rows_of_any(job, 6), rows_of_any(job, 9)
    num_blocks, num_chunks = ceil_div(channels, BLOCK), ceil_div(num_tokens, _CHUNK)
    share = _ONE / np.float32(num_directions)
    h_array = np.empty((state_size, BLOCK), np.float32)
    delta_array = np.empty((1, BLOCK), np.float32)
    sum_array = np.empty((num_tokens, BLOCK), np.float32)  # of y over the directions
    h, deltas, sums = scratch(h_array), scratch(delta_array), scratch(sum_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * BLOCK
        stop = min(start + BLOCK, channels)
        for g in range(num_directions):
            h_array[:] = 0.0
            for i in range(num_tokens):
                t = _position(g, i, num_tokens)
                image_row = b * num_tokens + t
                row = g * batch_size * num_tokens + image_row
                if states[0] != 0 and i % _CHUNK == 0:
                    kept = ((g * batch_size + b) * num_chunks + i // _CHUNK) * state_size
                    for n in range(state_size):
                        for e in range(start, stop, LANES):
                            store(states, kept + n, e, load(h, n, e - start))
                for e in range(start, stop, LANES):
                    delta = _scaled(softplus(load(dt, row, e) + load(dt_bias, g, e)), dt_scale, image_row)
                    store(deltas, 0, e - start, delta)
                for e in range(start, stop, LANES):
                    c = e - start
                    x_t, delta = load(x, row, e), load(deltas, 0, c)
                    drive = delta * x_t
                    y = load(D, g, e) * x_t
                    for n in range(state_size):
                        decay = exp2(delta * load(A, g * state_size + n, e))
                        h_n = decay * load(h, n, c) + drive * full(load_scalar(B, row, n))
                        store(h, n, c, h_n)
                        y = y + h_n * full(load_scalar(C, row, n))
                    if g > 0:
                        y = y + load(sums, t, c)
                    store(sums, t, c, y)
        for t in range(num_tokens):
            for e in range(start, stop, LANES):
                y = load(sums, t, e - start) * full(share)
                if z[0] != 0:
                    gate = load(z, b * num_tokens + t, e)
                    y = y * gate * sigmoid(gate)
                store(out, b * num_tokens + t, e, y)
    keep((h_array, delta_array, sum_array))


@kernel
def _scan_backward(address):
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    job = open_job(address, 19)
    num_directions, batch_size, num_tokens, channels, state_size = sizes(job)
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    dA, dB, dC, dD, ddt_bias = rows(job, 13), rows(job, 14), rows(job, 15), rows(job, 16), rows(job, 18)
    x, dt, z, dout = rows_of_any(job, 0), rows_of_any(job, 1), rows_of_any(job, 6), rows_of_any(job, 9)
    dx, ddt, dz = rows_of_any(job, 11), rows_of_any(job, 12), rows_of_any(job, 17)
    num_blocks, num_chunks = ceil_div(channels, BLOCK), ceil_div(num_tokens, _CHUNK)
    share, log_2 = _ONE / np.float32(num_directions), np.float32(np.log(2.0))
    # h[i] is the state before step i of the chunk, h[i + 1] the one after it
    h_array = np.empty(((_CHUNK + 1) * state_size, BLOCK), np.float32)
    decay_array = np.empty((_CHUNK * state_size, BLOCK), np.float32)
    delta_array = np.empty((_CHUNK, BLOCK), np.float32)
    carried_array = np.empty((state_size, BLOCK), np.float32)  # decay_{t+1} g_{t+1}
    dy_array, slope_array = np.empty((1, BLOCK), np.float32), np.empty((2, BLOCK), np.float32)
    dz_array = np.empty((num_tokens, BLOCK), np.float32)  # sum over the directions
    dB_array, dC_array = np.empty((state_size, LANES), np.float32), np.empty((state_size, LANES), np.float32)
    h, decays, deltas, carried = (
        scratch(h_array), scratch(decay_array), scratch(delta_array), scratch(carried_array)
    )  # fmt: skip
    dys, slopes, d_gates = scratch(dy_array), scratch(slope_array), scratch(dz_array)
    dB_t, dC_t = scratch(dB_array), scratch(dC_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, block = task // num_blocks, task % num_blocks
        start = block * BLOCK
        stop = min(start + BLOCK, channels)
        for g in range(num_directions):
            carried_array[:] = 0.0
            image_direction = b * num_directions + g
            for e in range(start, stop, LANES):
                for n in range(state_size):
                    store(dA, image_direction * state_size + n, e, full(_ZERO))
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
                        delta = _scaled(softplus(load(dt, row, e) + load(dt_bias, g, e)), dt_scale, image_row)
                        store(deltas, i, e - start, delta)
                    for e in range(start, stop, LANES):
                        c = e - start
                        delta = load(deltas, i, c)
                        drive = delta * load(x, row, e)
                        for n in range(state_size):
                            decay = exp2(delta * load(A, g * state_size + n, e))
                            store(decays, i * state_size + n, c, decay)
                            h_n = decay * load(h, i * state_size + n, c) + drive * full(load_scalar(B, row, n))
                            store(h, (i + 1) * state_size + n, c, h_n)

                for i in range(steps - 1, -1, -1):
                    t = _position(g, first + i, num_tokens)
                    image_row = b * num_tokens + t
                    row = g * batch_size * num_tokens + image_row
                    dB_array[:] = 0.0
                    dC_array[:] = 0.0
                    for e in range(start, stop, LANES):
                        c = e - start
                        dy = load(dout, image_row, e) * full(share)
                        if z[0] != 0:
                            gate = load(z, image_row, e)
                            gate_sigmoid = sigmoid(gate)
                            # d silu(z) / dz = s (1 + z (1 - s))
                            slope = gate_sigmoid * (full(_ONE) + gate * (full(_ONE) - gate_sigmoid))
                            store(slopes, 1, c, dy * slope)
                            dy = dy * gate * gate_sigmoid
                        store(dys, 0, c, dy)
                        slope = _scaled(sigmoid(load(dt, row, e) + load(dt_bias, g, e)), dt_scale, image_row)
                        store(slopes, 0, c, slope)
                    for e in range(start, stop, LANES):
                        c = e - start
                        dy, x_t, delta, skip = load(dys, 0, c), load(x, row, e), load(deltas, i, c), load(D, g, e)
                        drive = delta * x_t
                        y, d_drive, d_delta = skip * x_t, full(_ZERO), full(_ZERO)
                        for n in range(state_size):
                            B_n, C_n = full(load_scalar(B, row, n)), full(load_scalar(C, row, n))
                            after = load(h, (i + 1) * state_size + n, c)
                            adjoint = load(carried, n, c) + dy * C_n
                            y = y + after * C_n
                            store(dC_t, n, 0, load(dC_t, n, 0) + dy * after)
                            store(dB_t, n, 0, load(dB_t, n, 0) + adjoint * drive)
                            d_drive = d_drive + adjoint * B_n
                            adjoint = adjoint * load(decays, i * state_size + n, c)
                            store(carried, n, c, adjoint)
                            d_exponent = adjoint * load(h, i * state_size + n, c)
                            d_delta = d_delta + d_exponent * load(A, g * state_size + n, e)
                            dA_row = image_direction * state_size + n
                            store(dA, dA_row, e, load(dA, dA_row, e) + d_exponent * delta)
                        # A holds A log2(e), so its product with delta comes back by log(2)
                        d_delta = d_delta * full(log_2) + d_drive * x_t
                        store(dx, row, e, d_drive * delta + dy * skip)
                        store(dD, image_direction, e, load(dD, image_direction, e) + dy * x_t)
                        d_dt = d_delta * load(slopes, 0, c)
                        store(ddt, row, e, d_dt)
                        store(ddt_bias, image_direction, e, load(ddt_bias, image_direction, e) + d_dt)
                        if z[0] != 0:
                            d_gate = y * load(slopes, 1, c)
                            if g > 0:
                                d_gate = d_gate + load(d_gates, t, c)
                            store(d_gates, t, c, d_gate)
                    partial = block * num_directions * batch_size * num_tokens + row
                    for n in range(state_size):
                        store_scalar(dB, partial, n, reduce_sum(load(dB_t, n, 0)))
                        store_scalar(dC, partial, n, reduce_sum(load(dC_t, n, 0)))
        if z[0] != 0:
            for t in range(num_tokens):
                for e in range(start, stop, LANES):
                    store(dz, b * num_tokens + t, e, load(d_gates, t, e - start))
    keep((h_array, decay_array, delta_array, carried_array, dy_array, slope_array, dz_array, dB_array, dC_array))


# ---- tensors in, tensors out ----


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The tensors that both scan kernels begin with, as rows, and their shape."""
    if dt_bias is None:
        dt_bias = D.new_zeros(D.shape)
    A = A.float().mT * float(np.log2(np.e))
    x_, dt, z = (None if tensor is None else as_rows_of_any(pad_channels(tensor)) for tensor in (x, dt, z))
    A, D, dt_bias = (as_rows(pad_channels(tensor)) for tensor in (A, D, dt_bias))
    dt_scale = None if dt_scale is None else as_rows(dt_scale).reshape(-1, 1)
    inputs = [x_, dt, A, as_rows(B), as_rows(C), D, z, dt_bias, dt_scale]
    return inputs, (*x.shape[:3], x_.shape[-1], B.shape[-1])


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
    states = torch.empty(states_shape("numba", x, A, keep_states))
    out = torch.empty(batch_size * num_tokens, channels, dtype=row_dtype(x))
    launch_blocks(_scan_forward, shape, [*inputs, out, states if keep_states else None])
    return out[:, : x.shape[-1]].contiguous().view(x.shape[1:]).to(x.dtype), states


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, A, B, C, D, z and dt_bias; that of an absent z is None.

    Those of x, dt and z are in bfloat16 if these are, all others in float32."""
    inputs, shape = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    num_directions, batch_size, num_tokens, channels, state_size = shape
    num_rows, num_blocks = num_directions * batch_size * num_tokens, -(-channels // BLOCK)
    dx, ddt = (torch.empty(num_rows, channels, dtype=row_dtype(tensor)) for tensor in (x, dt))
    dA = torch.empty(batch_size * num_directions * state_size, channels)
    dB, dC = torch.empty(num_blocks * num_rows, state_size), torch.empty(num_blocks * num_rows, state_size)
    dD, ddt_bias = (torch.empty(batch_size * num_directions, channels) for _ in range(2))
    dz = None if z is None else torch.empty(batch_size * num_tokens, channels, dtype=row_dtype(z))
    outputs = [dx, ddt, dA, dB, dC, dD, dz, ddt_bias]
    launch_blocks(_scan_backward, shape, [*inputs, as_rows_of_any(pad_channels(dout)), states, *outputs])

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
        None if z is None else whole(dz, batch_size, num_tokens),
        whole(ddt_bias, *images).sum(0),
    )


KERNELS = ScanKernels(scan_forward, scan_backward, conv_forward, conv_backward)
