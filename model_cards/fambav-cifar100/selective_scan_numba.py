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

Rows are fetched from memory, those to be written too, a few steps ahead of their use.

What does not depend on the state (the time steps, the gate) is computed for many tokens before the scan, which is then
one loop over time and states. A block of channels is few vectors of WIDE lanes, see numba_vectors.py.
"""

import numpy as np
from torch import Tensor

from .backends import CHUNK_STEPS, states_shape
from .numba_channels import (
    AHEAD,
    BLOCK,
    FLOATS,
    as_rows,
    as_rows_of_any,
    ceil_div,
    fetch_block,
    launch_blocks,
    pad_channels,
    row_dtype,
)
from .numba_functions import exp2_of_negative, sigmoid, softplus, softplus_and_sigmoid
from .numba_jobs import (
    Operand,
    buffer,
    inlined,
    keep,
    kernel,
    next_task,
    open_job,
    rows,
    rows_of_any,
    scratch,
    sizes,
)
from .numba_vectors import (
    LANES,
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

_CHUNK = CHUNK_STEPS["numba"]
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _position(g, i, num_tokens):
    return i if g == 0 else num_tokens - 1 - i


@inlined
def _scale_of(dt_scale, image_row):
    return load_scalar(dt_scale, image_row, 0) if dt_scale[0] != 0 else _ONE


@inlined
def _copy_rows(target, target_row, target_start, source, source_row, source_start, num_rows):
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


@kernel
def _scan_forward(address):
    job = open_job(address, 11)
    num_directions, batch_size, num_tokens, channels, state_size = sizes(job)
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    x, dt, z, out = rows_of_any(job, 0), rows_of_any(job, 1), rows_of_any(job, 6), rows_of_any(job, 9)
    num_blocks, num_chunks = channels // BLOCK, ceil_div(num_tokens, _CHUNK)
    share = _ONE / np.float32(num_directions)
    h_array = np.empty((state_size, BLOCK), np.float32)
    delta_array, drive_array = np.empty((_CHUNK, BLOCK), np.float32), np.empty((_CHUNK, BLOCK), np.float32)
    sum_array = np.empty((num_tokens, BLOCK), np.float32)  # of y over the directions
    h, deltas, drives, sums = scratch(h_array), scratch(delta_array), scratch(drive_array), scratch(sum_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * BLOCK
        sum_array[:] = 0.0
        for g in range(num_directions):
            h_array[:] = 0.0
            for chunk in range(num_chunks):
                first = chunk * _CHUNK
                steps = min(_CHUNK, num_tokens - first)
                if states[0] != 0:
                    kept = ((g * batch_size + b) * num_chunks + chunk) * state_size
                    _copy_rows(states, kept, start, h, 0, 0, state_size)

                for i in range(steps):
                    t = _position(g, first + i, num_tokens)
                    image_row = b * num_tokens + t
                    row = g * batch_size * num_tokens + image_row
                    ahead = row + (AHEAD if g == 0 else -AHEAD)
                    fetch_block(x, ahead, start)
                    fetch_block(dt, ahead, start)
                    scale = full_wide(_scale_of(dt_scale, image_row))
                    for c in range(0, BLOCK, WIDE):
                        x_t = load_wide(x, row, start + c)
                        delta = scale * softplus(load_wide(dt, row, start + c) + load_wide(dt_bias, g, start + c))
                        store(deltas, i, c, delta)
                        store(drives, i, c, delta * x_t)
                        store(sums, t, c, load_wide(sums, t, c) + load_wide(D, g, start + c) * x_t)

                for i in range(steps):
                    t = _position(g, first + i, num_tokens)
                    row = (g * batch_size + b) * num_tokens + t
                    for c in range(0, BLOCK, WIDE):
                        delta, drive, y = load_wide(deltas, i, c), load_wide(drives, i, c), load_wide(sums, t, c)
                        for n in range(state_size):
                            decay = exp2_of_negative(delta * load_wide(A, g * state_size + n, start + c))
                            h_n = decay * load_wide(h, n, c) + drive * full_wide(load_scalar(B, row, n))
                            store(h, n, c, h_n)
                            y = y + h_n * full_wide(load_scalar(C, row, n))
                        store(sums, t, c, y)

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
    keep((h_array, delta_array, drive_array, sum_array))


@kernel
def _scan_backward(address):
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block, with N
    up to a multiple of 4.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    job = open_job(address, 19)
    num_directions, batch_size, num_tokens, channels, state_size = sizes(job)
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    dA, dB, dC, dD, ddt_bias = rows(job, 13), rows(job, 14), rows(job, 15), rows(job, 16), rows(job, 18)
    x, dt, z, dout = rows_of_any(job, 0), rows_of_any(job, 1), rows_of_any(job, 6), rows_of_any(job, 9)
    dx, ddt, dz = rows_of_any(job, 11), rows_of_any(job, 12), rows_of_any(job, 17)
    num_blocks, num_chunks = channels // BLOCK, ceil_div(num_tokens, _CHUNK)
    share, log_2 = _ONE / np.float32(num_directions), np.float32(np.log(2.0))
    # h[i] is the state before step i of the chunk
    h_array = np.empty(((_CHUNK + 1) * state_size, BLOCK), np.float32)
    decay_array = np.empty((_CHUNK * state_size, BLOCK), np.float32)
    x_array, delta_array = np.empty((_CHUNK, BLOCK), np.float32), np.empty((_CHUNK, BLOCK), np.float32)
    slope_array = np.empty((_CHUNK, BLOCK), np.float32)  # d delta / d dt
    # over all tokens: the gradient of y, sum of y over the directions, and the gradient of the gate per unit of y
    dy_array, y_array, dgate_array = (
        np.empty((num_tokens, BLOCK), np.float32), np.empty((num_tokens, BLOCK), np.float32),
        np.empty((num_tokens, BLOCK), np.float32)
    )  # fmt: skip
    carried_array = np.empty((state_size, BLOCK), np.float32)  # decay_{t+1} g_{t+1}
    dA_array = np.empty((state_size, BLOCK), np.float32)
    bias_array = np.empty((2, BLOCK), np.float32)  # of dD and ddt_bias
    lane_array = np.zeros((ceil_div(state_size, 4) * 4, LANES), np.float32)  # of dB_t and of dC_t
    h, decays, deltas, slopes, xs = (
        scratch(h_array), scratch(decay_array), scratch(delta_array), scratch(slope_array), scratch(x_array)
    )  # fmt: skip
    dys, ys, dgates = scratch(dy_array), scratch(y_array), scratch(dgate_array)
    carried, dA_sum, sums, lanes = scratch(carried_array), scratch(dA_array), scratch(bias_array), scratch(lane_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, block = task // num_blocks, task % num_blocks
        start = block * BLOCK
        partial = block * num_directions * batch_size * num_tokens  # first row of the sums over this block

        y_array[:] = 0.0
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

        for g in range(num_directions):
            carried_array[:] = 0.0
            dA_array[:] = 0.0
            bias_array[:] = 0.0
            for chunk in range(num_chunks - 1, -1, -1):
                first = chunk * _CHUNK
                steps = min(_CHUNK, num_tokens - first)
                kept = ((g * batch_size + b) * num_chunks + chunk) * state_size
                for n in range(state_size):
                    fetch_block(states, kept + n, start)

                for i in range(steps):
                    t = _position(g, first + i, num_tokens)
                    image_row = b * num_tokens + t
                    row = g * batch_size * num_tokens + image_row
                    ahead = row + (AHEAD if g == 0 else -AHEAD)
                    fetch_block(x, ahead, start)
                    fetch_block(dt, ahead, start)
                    scale = full_wide(_scale_of(dt_scale, image_row))
                    for c in range(0, BLOCK, WIDE):
                        x_t = load_wide(x, row, start + c)
                        raw = load_wide(dt, row, start + c) + load_wide(dt_bias, g, start + c)
                        delta, slope = softplus_and_sigmoid(raw)
                        store(xs, i, c, x_t)
                        store(deltas, i, c, scale * delta)
                        store(slopes, i, c, scale * slope)
                        store(ys, t, c, load_wide(ys, t, c) + load_wide(D, g, start + c) * x_t)

                _copy_rows(h, 0, 0, states, kept, start, state_size)
                for i in range(steps):
                    t = _position(g, first + i, num_tokens)
                    row = (g * batch_size + b) * num_tokens + t
                    for c in range(0, BLOCK, WIDE):
                        delta, y, dy = load_wide(deltas, i, c), load_wide(ys, t, c), load_wide(dys, t, c)
                        drive = delta * load_wide(xs, i, c)
                        for n in range(state_size):
                            decay = exp2_of_negative(delta * load_wide(A, g * state_size + n, start + c))
                            store(decays, i * state_size + n, c, decay)
                            h_n = decay * load_wide(h, i * state_size + n, c)
                            h_n = h_n + drive * full_wide(load_scalar(B, row, n))
                            store(h, (i + 1) * state_size + n, c, h_n)
                            y = y + h_n * full_wide(load_scalar(C, row, n))
                            dC_n = full(_ZERO) if c == 0 else load(lanes, n, 0)
                            store(lanes, n, 0, add_products(dC_n, dy, h_n))
                        store(ys, t, c, y)
                    _reduce_rows(dC, partial + row, lanes, state_size)

                for i in range(steps - 1, -1, -1):
                    t = _position(g, first + i, num_tokens)
                    row = (g * batch_size + b) * num_tokens + t
                    ahead = row + (-AHEAD if g == 0 else AHEAD)
                    fetch_block(dx, ahead, start)
                    fetch_block(ddt, ahead, start)
                    for c in range(0, BLOCK, WIDE):
                        delta, x_t, dy = load_wide(deltas, i, c), load_wide(xs, i, c), load_wide(dys, t, c)
                        drive = delta * x_t
                        d_drive, d_delta = full_wide(_ZERO), full_wide(_ZERO)
                        for n in range(state_size):
                            adjoint = load_wide(carried, n, c) + dy * full_wide(load_scalar(C, row, n))
                            dB_n = full(_ZERO) if c == 0 else load(lanes, n, 0)
                            store(lanes, n, 0, add_products(dB_n, adjoint, drive))
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

            image_direction = b * num_directions + g
            _copy_rows(dA, image_direction * state_size, start, dA_sum, 0, 0, state_size)
            _copy_rows(dD, image_direction, start, sums, 0, 0, 1)
            _copy_rows(ddt_bias, image_direction, start, sums, 1, 0, 1)

        if z[0] != 0:
            for t in range(num_tokens):
                fetch_block(dz, b * num_tokens + t + AHEAD, start)
                for c in range(0, BLOCK, WIDE):
                    store(dz, b * num_tokens + t, start + c, load_wide(ys, t, c) * load_wide(dgates, t, c))
    keep((h_array, decay_array, x_array, delta_array, slope_array, dy_array, y_array, dgate_array))
    keep((carried_array, dA_array, bias_array, lane_array))


# ---- tensors in, tensors out ----


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> tuple[list[Operand], tuple[int, ...]]:
    """The tensors that both scan kernels begin with, as rows, and their shape."""
    if dt_bias is None:
        dt_bias = D.new_zeros(D.shape)
    A = A.float().mT * float(np.log2(np.e))
    x_, dt, z = (None if tensor is None else as_rows_of_any(pad_channels(tensor)) for tensor in (x, dt, z))
    A, D, dt_bias = (as_rows(pad_channels(tensor)) for tensor in (A, D, dt_bias))
    dt_scale = None if dt_scale is None else as_rows(dt_scale).reshape(-1, 1)
    num_directions, batch_size, num_tokens = x.shape[:3]
    channels, state_size = x_.shape[-1], B.shape[-1]
    image_rows = batch_size * num_tokens
    num_rows = num_directions * image_rows
    inputs = [
        Operand("x", x_, num_rows, channels, FLOATS),
        Operand("dt", dt, num_rows, channels, FLOATS),
        Operand("A", A, num_directions * state_size, channels),
        Operand("B", as_rows(B), num_rows, state_size),
        Operand("C", as_rows(C), num_rows, state_size),
        Operand("D", D, num_directions, channels),
        Operand("z", z, image_rows, channels, FLOATS),
        Operand("dt_bias", dt_bias, num_directions, channels),
        Operand("dt_scale", dt_scale, image_rows, 1),
    ]
    return inputs, (num_directions, batch_size, num_tokens, channels, state_size)


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
    states = buffer("states", *states_shape("numba", x, A, keep_states))
    out = buffer("out", batch_size * num_tokens, channels, row_dtype(x))
    kept = states if keep_states else states._replace(tensor=None)
    launch_blocks(_scan_forward, shape, [*inputs, out, kept])
    return out.tensor[:, : x.shape[-1]].contiguous().view(x.shape[1:]).to(x.dtype), states.tensor


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
    image_rows, image_directions = batch_size * num_tokens, batch_size * num_directions
    num_rows, num_blocks = num_directions * image_rows, -(-channels // BLOCK)
    dout = Operand("dout", as_rows_of_any(pad_channels(dout)), image_rows, channels, FLOATS)
    states = Operand("states", states, *states_shape("numba", x, A, keep_states=True))
    whole_fours = -(-state_size // 4) * 4
    outputs = [
        buffer("dx", num_rows, channels, row_dtype(x)),
        buffer("ddt", num_rows, channels, row_dtype(dt)),
        buffer("dA", image_directions * state_size, channels),
        buffer("dB", num_blocks * num_rows, whole_fours),
        buffer("dC", num_blocks * num_rows, whole_fours),
        buffer("dD", image_directions, channels),
        Operand("dz", None, image_rows, channels) if z is None else buffer("dz", image_rows, channels, row_dtype(z)),
        buffer("ddt_bias", image_directions, channels),
    ]
    launch_blocks(_scan_backward, shape, [*inputs, dout, states, *outputs])
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias = (output.tensor for output in outputs)

    def whole(tensor: Tensor, *leading: int) -> Tensor:
        return tensor[..., : x.shape[-1]].reshape(*leading, x.shape[-1])

    images = (batch_size, num_directions)
    return (
        whole(dx, *x.shape[:3]),
        whole(ddt, *x.shape[:3]),
        whole(dA, *images, state_size).sum(0).mT,
        dB.view(num_blocks, *B.shape[:3], whole_fours)[..., :state_size].sum(0),
        dC.view(num_blocks, *C.shape[:3], whole_fours)[..., :state_size].sum(0),
        whole(dD, *images).sum(0),
        None if z is None else whole(dz, batch_size, num_tokens),
        whole(ddt_bias, *images).sum(0),
    )
