"""CPU kernels of the selective scan and of the convolution before it, compiled by numba at first use.

One call does all directions and everything around the scan: bias, softplus and scale of the time steps, skip
connection, gate and mean. Tensors are channels-last, and the backward direction walks through time from the end, so
nothing is flipped, transposed or copied. Names are those of `selective_scan.py`; in the kernels

    tensors are rows: (G*B*T, E) or (G*B*T, N) or (B*T, E), with any distance between rows
    those with a value per token and channel are float32 or bfloat16, all others float32; all sums are in float32
    A is (G*N, E) and multiplied by log2(e), so that the decay is exp2(delta * A)
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence

A task is one image and one block of channels. It owns its outputs, so that threads share nothing and the results do
not depend on their number; sums over images or blocks are left to the caller.

The forward pass keeps the states at the start of every chunk of time; the backward pass computes those in between
again, one chunk at a time.

A step is several short loops over the channels rather than a long one: the chain of operations on one vector is long
and the vectors are independent, so a core is busy only if it sees several of them at once.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .numba_jobs import inlined, kernel, launch, next_task, open_job, rows, rows_of_any, scratch, sizes
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

# Channels of one task: four vectors, so that a step reads runs of whole cache lines.
_BLOCK = 64
_CHUNK = CHUNK_STEPS["numba"]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _ceil_div(number, divisor):
    return (number + divisor - 1) // divisor


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
    num_blocks, num_chunks = _ceil_div(channels, _BLOCK), _ceil_div(num_tokens, _CHUNK)
    share = _ONE / np.float32(num_directions)
    h_array = np.empty((state_size, _BLOCK), np.float32)
    delta_array = np.empty((1, _BLOCK), np.float32)
    sum_array = np.empty((num_tokens, _BLOCK), np.float32)  # of y over the directions
    h, deltas, sums = scratch(h_array), scratch(delta_array), scratch(sum_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        stop = min(start + _BLOCK, channels)
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
    num_blocks, num_chunks = _ceil_div(channels, _BLOCK), _ceil_div(num_tokens, _CHUNK)
    share, log_2 = _ONE / np.float32(num_directions), np.float32(np.log(2.0))
    # h[i] is the state before step i of the chunk, h[i + 1] the one after it
    h_array = np.empty(((_CHUNK + 1) * state_size, _BLOCK), np.float32)
    decay_array = np.empty((_CHUNK * state_size, _BLOCK), np.float32)
    delta_array = np.empty((_CHUNK, _BLOCK), np.float32)
    carried_array = np.empty((state_size, _BLOCK), np.float32)  # decay_{t+1} g_{t+1}
    dy_array, slope_array = np.empty((1, _BLOCK), np.float32), np.empty((2, _BLOCK), np.float32)
    dz_array = np.empty((num_tokens, _BLOCK), np.float32)  # sum over the directions
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
        start = block * _BLOCK
        stop = min(start + _BLOCK, channels)
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


@inlined
def _before(g, t, distance):
    """The position this many steps before t in the direction's own time."""
    return t - distance if g == 0 else t + distance


@inlined
def _load_tokens(tokens, x, b, num_tokens, start, stop):
    """Copy a block of channels of one image to `tokens`, (T, block)."""
    for t in range(num_tokens):
        for e in range(start, stop, LANES):
            store(tokens, t, e - start, load(x, b * num_tokens + t, e))


@inlined
def _convolved(tokens, weight, bias, g, t, e, c, num_tokens, kernel_size):
    """Before the SiLU. The last tap belongs to the current token."""
    total = load(bias, g, e)
    for k in range(kernel_size):
        source = _before(g, t, kernel_size - 1 - k)
        if 0 <= source < num_tokens:
            total = total + load(tokens, source, c) * load(weight, g * kernel_size + k, e)
    return total


@kernel
def _conv_forward(address):
    job = open_job(address, 4)
    num_directions, batch_size, num_tokens, channels, kernel_size = sizes(job)
    x, weight, bias, out = rows_of_any(job, 0), rows(job, 1), rows(job, 2), rows_of_any(job, 3)
    num_blocks = _ceil_div(channels, _BLOCK)
    token_array = np.empty((num_tokens, _BLOCK), np.float32)
    tokens = scratch(token_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        stop = min(start + _BLOCK, channels)
        _load_tokens(tokens, x, b, num_tokens, start, stop)
        for g in range(num_directions):
            for t in range(num_tokens):
                for e in range(start, stop, LANES):
                    u = _convolved(tokens, weight, bias, g, t, e, e - start, num_tokens, kernel_size)
                    store(out, (g * batch_size + b) * num_tokens + t, e, u * sigmoid(u))


@kernel
def _conv_backward(address):
    """Gradients. dweight (B*G*K, E) and dbias (B*G, E) are per image."""
    job = open_job(address, 7)
    num_directions, batch_size, num_tokens, channels, kernel_size = sizes(job)
    weight, bias, dweight, dbias = rows(job, 1), rows(job, 2), rows(job, 5), rows(job, 6)
    x, dout, dx = rows_of_any(job, 0), rows_of_any(job, 3), rows_of_any(job, 4)
    num_blocks = _ceil_div(channels, _BLOCK)
    token_array = np.empty((num_tokens, _BLOCK), np.float32)
    du_array = np.empty((num_directions * num_tokens, _BLOCK), np.float32)  # gradient before the SiLU
    tokens, du = scratch(token_array), scratch(du_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * _BLOCK
        stop = min(start + _BLOCK, channels)
        _load_tokens(tokens, x, b, num_tokens, start, stop)
        for g in range(num_directions):
            for t in range(num_tokens):
                for e in range(start, stop, LANES):
                    u = _convolved(tokens, weight, bias, g, t, e, e - start, num_tokens, kernel_size)
                    s = sigmoid(u)
                    dout_t = load(dout, (g * batch_size + b) * num_tokens + t, e)
                    store(du, g * num_tokens + t, e - start, dout_t * s * (full(_ONE) + u * (full(_ONE) - s)))
        for g in range(num_directions):
            image_direction = b * num_directions + g
            for e in range(start, stop, LANES):
                c = e - start
                total = full(_ZERO)
                for t in range(num_tokens):
                    total = total + load(du, g * num_tokens + t, c)
                store(dbias, image_direction, e, total)
                for k in range(kernel_size):
                    total = full(_ZERO)
                    for t in range(num_tokens):
                        source = _before(g, t, kernel_size - 1 - k)
                        if 0 <= source < num_tokens:
                            total = total + load(du, g * num_tokens + t, c) * load(tokens, source, c)
                    store(dweight, image_direction * kernel_size + k, e, total)
        for t in range(num_tokens):
            for e in range(start, stop, LANES):
                total = full(_ZERO)
                for g in range(num_directions):
                    for k in range(kernel_size):
                        target = _before(g, t, k + 1 - kernel_size)
                        if 0 <= target < num_tokens:
                            du_t = load(du, g * num_tokens + target, e - start)
                            total = total + du_t * load(weight, g * kernel_size + k, e)
                store(dx, b * num_tokens + t, e, total)


# ---- tensors in, tensors out ----


def _as_rows(tensor: Tensor) -> Tensor:
    """float32, everything but the last dimension as rows; a view wherever the strides allow it."""
    return _as_rows_of_any(tensor.float())


def _row_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels read and write of a tensor with a value per token and channel."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32


def _as_rows_of_any(tensor: Tensor) -> Tensor:
    """As `_as_rows`, but bfloat16 stays what it is."""
    tensor = tensor.detach().to(_row_dtype(tensor))
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, tensor.shape[-1])


def _pad_channels(tensor: Tensor) -> Tensor:
    """Zeros up to a whole number of vectors; the padded channels stay zero all the way."""
    missing = -tensor.shape[-1] % LANES
    return F.pad(tensor, (0, missing)) if missing else tensor


def _launch(kernel, shape: tuple[int, ...], tensors: list[Tensor | None]) -> None:
    """Run a kernel on rows. `shape` is (G, B, T, E, N or K)."""
    launch(kernel, shape[1] * -(-shape[3] // _BLOCK), shape, tensors)


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The tensors that both scan kernels begin with, as rows, and their shape."""
    if dt_bias is None:
        dt_bias = D.new_zeros(D.shape)
    A = A.float().mT * float(np.log2(np.e))
    x_, dt, z = (None if tensor is None else _as_rows_of_any(_pad_channels(tensor)) for tensor in (x, dt, z))
    A, D, dt_bias = (_as_rows(_pad_channels(tensor)) for tensor in (A, D, dt_bias))
    dt_scale = None if dt_scale is None else _as_rows(dt_scale).reshape(-1, 1)
    inputs = [x_, dt, A, _as_rows(B), _as_rows(C), D, z, dt_bias, dt_scale]
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
    out = torch.empty(batch_size * num_tokens, channels, dtype=_row_dtype(x))
    _launch(_scan_forward, shape, [*inputs, out, states if keep_states else None])
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
    num_rows, num_blocks = num_directions * batch_size * num_tokens, -(-channels // _BLOCK)
    dx, ddt = (torch.empty(num_rows, channels, dtype=_row_dtype(tensor)) for tensor in (x, dt))
    dA = torch.empty(batch_size * num_directions * state_size, channels)
    dB, dC = torch.empty(num_blocks * num_rows, state_size), torch.empty(num_blocks * num_rows, state_size)
    dD, ddt_bias = (torch.empty(batch_size * num_directions, channels) for _ in range(2))
    dz = None if z is None else torch.empty(batch_size * num_tokens, channels, dtype=_row_dtype(z))
    outputs = [dx, ddt, dA, dB, dC, dD, dz, ddt_bias]
    _launch(_scan_backward, shape, [*inputs, _as_rows_of_any(_pad_channels(dout)), states, *outputs])

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


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    inputs = [_as_rows_of_any(_pad_channels(x)), _as_rows(_pad_channels(weight.mT)), _as_rows(_pad_channels(bias))]
    return inputs, (weight.shape[0], *x.shape[:2], inputs[0].shape[-1], weight.shape[-1])


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, _ = shape
    out = torch.empty(num_directions * batch_size * num_tokens, channels, dtype=_row_dtype(x))
    _launch(_conv_forward, shape, [*inputs, out])
    return out[:, : x.shape[-1]].contiguous().view(num_directions, *x.shape).to(x.dtype)


def conv_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in bfloat16 if x is and else in float32, and of weight and bias, in float32."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    dx = torch.empty(batch_size * num_tokens, channels, dtype=_row_dtype(x))
    dweight = torch.empty(batch_size * num_directions * kernel_size, channels)
    dbias = torch.empty(batch_size * num_directions, channels)
    _launch(_conv_backward, shape, [*inputs, _as_rows_of_any(_pad_channels(dout)), dx, dweight, dbias])
    dweight = dweight.view(batch_size, num_directions, kernel_size, channels).sum(0)
    dbias = dbias.view(batch_size, num_directions, channels).sum(0)
    width = x.shape[-1]
    return dx[:, :width].contiguous().view(x.shape), dweight[..., :width].mT, dbias[:, :width]


KERNELS = ScanKernels(scan_forward, scan_backward, conv_forward, conv_backward)
