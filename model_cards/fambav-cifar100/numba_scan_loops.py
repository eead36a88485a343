"""The loops of the CPU scan: over the steps of a chunk, or over all tokens, for one image and one block of channels.

selective_scan_numba.py puts them together and explains the names. What does not depend on the state (time steps, gate)
has loops of its own, so that the recurrence is one loop over steps, vectors and states. `shape` is (G, B, T, E, N);
arguments that end in s are scratch rows, a row a step or a token. `own` is 1 where a channel counts in sums over the
block, see `mark_own`.
"""

import numpy as np

from .numba_channels import AHEAD, BLOCK, fetch_block
from .numba_functions import exp2_of_negative, sigmoid, softplus, softplus_and_sigmoid
from .numba_jobs import inlined
from .numba_vectors import (
    WIDE,
    add_products,
    full,
    full_wide,
    load,
    load_scalar,
    load_wide,
    store,
    store_sums,
)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _position(g, i, num_tokens):
    return i if g == 0 else num_tokens - 1 - i


@inlined
def _scale_of(dt_scale, image_row):
    return load_scalar(dt_scale, image_row, 0) if dt_scale[0] != 0 else _ONE


@inlined
def copy_rows(target, target_row, target_start, source, source_row, source_start, num_rows):
    """Copy a block of channels of some rows."""
    for n in range(num_rows):
        for c in range(0, BLOCK, WIDE):
            store(target, target_row + n, target_start + c, load_wide(source, source_row + n, source_start + c))


@inlined
def _reduce_rows(sums, sum_row, lanes, num_rows):
    """Sum up the lanes of every row, four rows at a time."""
    for n in range(0, num_rows, 4):
        store_sums(
            sums, sum_row, n, load(lanes, n, 0), load(lanes, n + 1, 0), load(lanes, n + 2, 0), load(lanes, n + 3, 0)
        )


@inlined
def _fetch_step(first, second, row, g, start):
    """Begin to bring the rows of a later step of the scan into the cache; before them for the backward direction."""
    ahead = row + (AHEAD if g == 0 else -AHEAD)
    fetch_block(first, ahead, start)
    fetch_block(second, ahead, start)


# ---- the forward pass: a loop over the steps of a chunk each ----


@inlined
def prepare_forward(x, dt, D, dt_bias, dt_scale, g, b, shape, start, first, steps, deltas, drives, sums):
    """Time steps and drives of a chunk, and what the skip connection adds to y."""
    num_tokens = shape[2]
    for i in range(steps):
        t = _position(g, first + i, num_tokens)
        row = (g * shape[1] + b) * num_tokens + t
        _fetch_step(x, dt, row, g, start)
        scale = full_wide(_scale_of(dt_scale, b * num_tokens + t))
        for c in range(0, BLOCK, WIDE):
            x_t = load_wide(x, row, start + c)
            delta = scale * softplus(load_wide(dt, row, start + c) + load_wide(dt_bias, g, start + c))
            store(deltas, i, c, delta)
            store(drives, i, c, delta * x_t)
            store(sums, t, c, load_wide(sums, t, c) + load_wide(D, g, start + c) * x_t)


@inlined
def scan_chunk(A, B, C, g, b, shape, start, first, steps, deltas, drives, h, sums):
    """The recurrence: states in `h`, and what they add to y."""
    num_tokens, state_size = shape[2], shape[4]
    for i in range(steps):
        t = _position(g, first + i, num_tokens)
        row = (g * shape[1] + b) * num_tokens + t
        for c in range(0, BLOCK, WIDE):
            delta, drive, y = load_wide(deltas, i, c), load_wide(drives, i, c), load_wide(sums, t, c)
            for n in range(state_size):
                decay = exp2_of_negative(delta * load_wide(A, g * state_size + n, start + c))
                h_n = decay * load_wide(h, n, c) + drive * full_wide(load_scalar(B, row, n))
                store(h, n, c, h_n)
                y = y + h_n * full_wide(load_scalar(C, row, n))
            store(sums, t, c, y)


@inlined
def gated_mean(out, z, b, shape, start, sums):
    """The output, from the sum of y over the directions."""
    num_tokens, share = shape[2], _ONE / np.float32(shape[0])
    for t in range(num_tokens):
        row = b * num_tokens + t
        fetch_block(out, row + AHEAD, start)
        if z[0] != 0:
            fetch_block(z, row + AHEAD, start)
        for c in range(0, BLOCK, WIDE):
            y = load_wide(sums, t, c) * full_wide(share)
            if z[0] != 0:
                gate = load_wide(z, row, start + c)
                y = y * gate * sigmoid(gate)
            store(out, row, start + c, y)


# ---- the backward pass: a loop over the steps of a chunk, or over all tokens, each ----


@inlined
def gradient_of_y(dout, z, b, shape, start, dys, dgates):
    """dy of all tokens, which both directions share, and the gradient of the gate per unit of y."""
    num_tokens, share = shape[2], _ONE / np.float32(shape[0])
    for t in range(num_tokens):
        row = b * num_tokens + t
        fetch_block(dout, row + AHEAD, start)
        if z[0] != 0:
            fetch_block(z, row + AHEAD, start)
        for c in range(0, BLOCK, WIDE):
            dy = load_wide(dout, row, start + c) * full_wide(share)
            if z[0] != 0:
                gate = load_wide(z, row, start + c)
                gate_sigmoid = sigmoid(gate)
                # d silu(z) / dz = s (1 + z (1 - s))
                slope = gate_sigmoid * (full_wide(_ONE) + gate * (full_wide(_ONE) - gate_sigmoid))
                store(dgates, t, c, dy * slope)
                dy = dy * gate * gate_sigmoid
            store(dys, t, c, dy)


@inlined
def prepare_backward(x, dt, D, dt_bias, dt_scale, g, b, shape, start, first, steps, deltas, slopes, xs, ys):
    """Inputs, time steps and their slopes d delta / d dt of a chunk, and what the skip connection adds to y."""
    num_tokens = shape[2]
    for i in range(steps):
        t = _position(g, first + i, num_tokens)
        row = (g * shape[1] + b) * num_tokens + t
        _fetch_step(x, dt, row, g, start)
        scale = full_wide(_scale_of(dt_scale, b * num_tokens + t))
        for c in range(0, BLOCK, WIDE):
            x_t = load_wide(x, row, start + c)
            delta, slope = softplus_and_sigmoid(load_wide(dt, row, start + c) + load_wide(dt_bias, g, start + c))
            store(xs, i, c, x_t)
            store(deltas, i, c, scale * delta)
            store(slopes, i, c, scale * slope)
            store(ys, t, c, load_wide(ys, t, c) + load_wide(D, g, start + c) * x_t)


@inlined
def scan_chunk_again(
    A, B, C, dC, g, b, shape, start, first, steps, partial, deltas, xs, dys, ys, decays, h, lanes, own
):
    """The recurrence once more: decays, the state before every step in `h`, what they add to y, and dC."""
    num_tokens, state_size = shape[2], shape[4]
    for i in range(steps):
        t = _position(g, first + i, num_tokens)
        row = (g * shape[1] + b) * num_tokens + t
        for c in range(0, BLOCK, WIDE):
            delta, y = load_wide(deltas, i, c), load_wide(ys, t, c)
            own_dy = load_wide(dys, t, c) * load_wide(own, 0, c)
            drive = delta * load_wide(xs, i, c)
            for n in range(state_size):
                decay = exp2_of_negative(delta * load_wide(A, g * state_size + n, start + c))
                store(decays, i * state_size + n, c, decay)
                h_n = decay * load_wide(h, i * state_size + n, c)
                h_n = h_n + drive * full_wide(load_scalar(B, row, n))
                store(h, (i + 1) * state_size + n, c, h_n)
                y = y + h_n * full_wide(load_scalar(C, row, n))
                dC_n = full(_ZERO) if c == 0 else load(lanes, n, 0)
                store(lanes, n, 0, add_products(dC_n, own_dy, h_n))
            store(ys, t, c, y)
        _reduce_rows(dC, partial + row, lanes, state_size)


@inlined
def adjoint_of_chunk(
    A, B, C, D, dx, ddt, dB, g, b, shape, start, first, steps, partial,
    deltas, slopes, xs, dys, decays, h, carried, dA_sum, sums, lanes, own,
):  # fmt: skip
    """From the last step to the first: the adjoint of the state, and the gradients that it gives."""
    num_tokens, state_size, log_2 = shape[2], shape[4], np.float32(np.log(2.0))
    for i in range(steps - 1, -1, -1):
        t = _position(g, first + i, num_tokens)
        row = (g * shape[1] + b) * num_tokens + t
        _fetch_step(dx, ddt, row, 1 - g, start)
        for c in range(0, BLOCK, WIDE):
            delta, x_t, dy = load_wide(deltas, i, c), load_wide(xs, i, c), load_wide(dys, t, c)
            own_drive = delta * x_t * load_wide(own, 0, c)
            d_drive, d_delta = full_wide(_ZERO), full_wide(_ZERO)
            for n in range(state_size):
                adjoint = load_wide(carried, n, c) + dy * full_wide(load_scalar(C, row, n))
                dB_n = full(_ZERO) if c == 0 else load(lanes, n, 0)
                store(lanes, n, 0, add_products(dB_n, adjoint, own_drive))
                d_drive = d_drive + adjoint * full_wide(load_scalar(B, row, n))
                adjoint = adjoint * load_wide(decays, i * state_size + n, c)
                store(carried, n, c, adjoint)
                d_exponent = adjoint * load_wide(h, i * state_size + n, c)
                d_delta = d_delta + d_exponent * load_wide(A, g * state_size + n, start + c)
                store(dA_sum, n, c, load_wide(dA_sum, n, c) + d_exponent * delta)
            # A holds A log2(e), so its product with delta comes back by log(2)
            d_delta = d_delta * full_wide(log_2) + d_drive * x_t
            d_dt = d_delta * load_wide(slopes, i, c)
            store(dx, row, start + c, d_drive * delta + dy * load_wide(D, g, start + c))
            store(ddt, row, start + c, d_dt)
            store(sums, 0, c, load_wide(sums, 0, c) + dy * x_t)
            store(sums, 1, c, load_wide(sums, 1, c) + d_dt)
        _reduce_rows(dB, partial + row, lanes, state_size)


@inlined
def gradient_of_gate(dz, b, shape, start, ys, dgates):
    num_tokens = shape[2]
    for t in range(num_tokens):
        fetch_block(dz, b * num_tokens + t + AHEAD, start)
        for c in range(0, BLOCK, WIDE):
            store(dz, b * num_tokens + t, start + c, load_wide(ys, t, c) * load_wide(dgates, t, c))
