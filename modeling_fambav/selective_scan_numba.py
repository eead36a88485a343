"""CPU kernels of the selective scan, compiled by numba at first use.

One call does all directions and everything around the scan: bias, softplus and scale of the time steps, skip
connection, gate and mean. Tensors are channels-last, and the backward direction walks through time from the end, so
nothing is flipped, transposed or copied. Names are those of `selective_scan.py`; in the kernels

    tensors are rows: (G*B*T, E) or (G*B*T, N) or (B*T, E), with any distance between rows
    those with a value per token and channel are float32 or bfloat16, all others float32; all sums are in float32
    A is (G*N, E) and multiplied by log2(e), so that the decay is exp2(delta * A)
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence

The forward pass keeps the states at the start of every chunk of time but the first, where they are zeros; the backward
pass computes those in between again, one chunk at a time.

Rows that will be read or written are prefetched a few steps ahead. The loops are in numba_scan_loops.py; a block of
channels is a few vectors of WIDE lanes, see numba_vectors.py.
"""

import numpy as np
from torch import Tensor

from .backends import CHUNK_STEPS, states_shape
from .numba_channels import (
    BLOCK,
    FLOATS,
    as_float32_rows,
    as_float_rows,
    ceil_div,
    fetch_block,
    first_channel,
    launch_blocks,
    mark_own,
    pad_channels,
    put,
    row_dtype,
    rows_of,
)
from .numba_jobs import (
    Operand,
    buffer,
    float_rows,
    inlined,
    keep,
    kernel,
    next_task,
    open_job,
    rows,
    scratch,
    sizes,
)
from .numba_scan_loops import (
    adjoint_of_chunk,
    copy_rows,
    gated_mean,
    gradient_of_gate,
    gradient_of_y,
    prepare_backward,
    prepare_forward,
    scan_chunk,
    scan_chunk_again,
)
from .numba_vectors import LANES

_CHUNK = CHUNK_STEPS["numba"]


@inlined
def _kept_row(g, b, chunk, batch_size, num_chunks, state_size):
    """First row of the states at the start of a chunk, which is not the first one."""
    return ((g * batch_size + b) * (num_chunks - 1) + chunk - 1) * state_size


@kernel
def _scan_forward(address):
    job = open_job(address, 11)
    shape = sizes(job)
    num_directions, batch_size, num_tokens, channels, state_size = shape
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    x, dt, z, out = float_rows(job, 0), float_rows(job, 1), float_rows(job, 6), float_rows(job, 9)
    num_blocks, num_chunks = ceil_div(channels, BLOCK), ceil_div(num_tokens, _CHUNK)
    h_array = np.empty((state_size, BLOCK), np.float32)
    delta_array, drive_array = np.empty((_CHUNK, BLOCK), np.float32), np.empty((_CHUNK, BLOCK), np.float32)
    sum_array = np.empty((num_tokens, BLOCK), np.float32)  # of y over the directions
    h, deltas, drives, sums = scratch(h_array), scratch(delta_array), scratch(drive_array), scratch(sum_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, first_channel(task % num_blocks, channels)
        sum_array[:] = 0.0
        for g in range(num_directions):
            h_array[:] = 0.0
            for chunk in range(num_chunks):
                first = chunk * _CHUNK
                steps = min(_CHUNK, num_tokens - first)
                if states[0] != 0 and chunk > 0:
                    kept = _kept_row(g, b, chunk, batch_size, num_chunks, state_size)
                    copy_rows(states, kept, start, h, 0, 0, state_size)
                prepare_forward(x, dt, D, dt_bias, dt_scale, g, b, shape, start, first, steps, deltas, drives, sums)
                scan_chunk(A, B, C, g, b, shape, start, first, steps, deltas, drives, h, sums)
        gated_mean(out, z, b, shape, start, sums)
    keep((h_array, delta_array, drive_array, sum_array))


@kernel
def _scan_backward(address):
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block, with N
    up to a multiple of 4.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    job = open_job(address, 19)
    shape = sizes(job)
    num_directions, batch_size, num_tokens, channels, state_size = shape
    A, B, C, D = rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    dt_bias, dt_scale, states = rows(job, 7), rows(job, 8), rows(job, 10)
    dA, dB, dC, dD, ddt_bias = rows(job, 13), rows(job, 14), rows(job, 15), rows(job, 16), rows(job, 18)
    x, dt, z, dout = float_rows(job, 0), float_rows(job, 1), float_rows(job, 6), float_rows(job, 9)
    dx, ddt, dz = float_rows(job, 11), float_rows(job, 12), float_rows(job, 17)
    num_blocks, num_chunks = ceil_div(channels, BLOCK), ceil_div(num_tokens, _CHUNK)
    # Of a chunk; h[i] is the state before step i
    h_array = np.empty(((_CHUNK + 1) * state_size, BLOCK), np.float32)
    decay_array = np.empty((_CHUNK * state_size, BLOCK), np.float32)
    x_array, delta_array = np.empty((_CHUNK, BLOCK), np.float32), np.empty((_CHUNK, BLOCK), np.float32)
    slope_array = np.empty((_CHUNK, BLOCK), np.float32)
    # Of all tokens; y is summed over the directions
    dy_array, y_array, dgate_array = (
        np.empty((num_tokens, BLOCK), np.float32), np.empty((num_tokens, BLOCK), np.float32),
        np.empty((num_tokens, BLOCK), np.float32)
    )  # fmt: skip
    carried_array = np.empty((state_size, BLOCK), np.float32)  # decay_{t+1} g_{t+1}
    dA_array = np.empty((state_size, BLOCK), np.float32)
    bias_array = np.empty((2, BLOCK), np.float32)  # of dD and ddt_bias
    lane_array = np.zeros((ceil_div(state_size, 4) * 4, LANES), np.float32)  # of dB_t and of dC_t
    own_array = np.empty((1, BLOCK), np.float32)  # channels that count in these
    h, decays, deltas, slopes, xs = (
        scratch(h_array), scratch(decay_array), scratch(delta_array), scratch(slope_array), scratch(x_array)
    )  # fmt: skip
    dys, ys, dgates = scratch(dy_array), scratch(y_array), scratch(dgate_array)
    carried, dA_sum, sums, lanes = scratch(carried_array), scratch(dA_array), scratch(bias_array), scratch(lane_array)
    own = scratch(own_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, block = task // num_blocks, task % num_blocks
        start = first_channel(block, channels)
        mark_own(own_array, block, channels)
        partial = block * num_directions * batch_size * num_tokens  # first row of the sums over this block
        y_array[:] = 0.0
        gradient_of_y(dout, z, b, shape, start, dys, dgates)
        for g in range(num_directions):
            carried_array[:] = 0.0
            dA_array[:] = 0.0
            bias_array[:] = 0.0
            for chunk in range(num_chunks - 1, -1, -1):
                first = chunk * _CHUNK
                steps = min(_CHUNK, num_tokens - first)
                kept = _kept_row(g, b, chunk, batch_size, num_chunks, state_size)
                if chunk > 0:
                    for n in range(state_size):
                        fetch_block(states, kept + n, start)
                prepare_backward(x, dt, D, dt_bias, dt_scale, g, b, shape, start, first, steps, deltas, slopes, xs, ys)
                if chunk > 0:
                    copy_rows(h, 0, 0, states, kept, start, state_size)
                else:
                    h_array[:state_size] = 0.0
                scan_chunk_again(
                    A, B, C, dC, g, b, shape, start, first, steps, partial, deltas, xs, dys, ys, decays, h, lanes, own
                )
                adjoint_of_chunk(
                    A, B, C, D, dx, ddt, dB, g, b, shape, start, first, steps, partial,
                    deltas, slopes, xs, dys, decays, h, carried, dA_sum, sums, lanes, own,
                )  # fmt: skip
            image_direction = b * num_directions + g
            copy_rows(dA, image_direction * state_size, start, dA_sum, 0, 0, state_size)
            copy_rows(dD, image_direction, start, sums, 0, 0, 1)
            copy_rows(ddt_bias, image_direction, start, sums, 1, 0, 1)
        if z[0] != 0:
            gradient_of_gate(dz, b, shape, start, ys, dgates)
    keep((h_array, decay_array, x_array, delta_array, slope_array, dy_array, y_array, dgate_array))
    keep((carried_array, dA_array, bias_array, lane_array, own_array))


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> tuple[list[Operand], tuple[int, ...]]:
    """The tensors that both scan kernels begin with, as rows, and their shape."""
    if dt_bias is None:
        dt_bias = D.new_zeros(D.shape)
    A = A.float().mT * float(np.log2(np.e))
    x_, dt, z = (None if tensor is None else as_float_rows(pad_channels(tensor)) for tensor in (x, dt, z))
    A, D, dt_bias = (as_float32_rows(pad_channels(tensor)) for tensor in (A, D, dt_bias))
    dt_scale = None if dt_scale is None else as_float32_rows(dt_scale).reshape(-1, 1)
    num_directions, batch_size, num_tokens = x.shape[:3]
    channels, state_size = x_.shape[-1], B.shape[-1]
    image_rows = batch_size * num_tokens
    num_rows = num_directions * image_rows
    inputs = [
        Operand("x", x_, num_rows, channels, FLOATS),
        Operand("dt", dt, num_rows, channels, FLOATS),
        Operand("A", A, num_directions * state_size, channels),
        Operand("B", as_float32_rows(B), num_rows, state_size),
        Operand("C", as_float32_rows(C), num_rows, state_size),
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
        the output `(B, T, E)`, and the float32 states at the start of every chunk but the first, which `scan_backward`
        needs; empty unless `keep_states`.
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
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, A, B, C, D, z and dt_bias.

    Those of x and dt are in bfloat16 if these are, that of z is in its dtype, all others are in float32. That of z is
    written to `dz` if that is given, and None if z is absent.
    """
    inputs, shape = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    num_directions, batch_size, num_tokens, channels, state_size = shape
    image_rows, image_directions = batch_size * num_tokens, batch_size * num_directions
    num_rows, num_blocks = num_directions * image_rows, -(-channels // BLOCK)
    dout = Operand("dout", as_float_rows(pad_channels(dout)), image_rows, channels, FLOATS)
    states = Operand("states", states, *states_shape("numba", x, A, keep_states=True))
    if z is None:
        dz, dz_rows = None, Operand("dz", None, image_rows, channels)
    else:
        dz = z.new_empty(z.shape) if dz is None else dz
        dz_rows = rows_of("dz", dz, channels)
    whole_fours = -(-state_size // 4) * 4
    outputs = [
        buffer("dx", num_rows, channels, row_dtype(x)),
        buffer("ddt", num_rows, channels, row_dtype(dt)),
        buffer("dA", image_directions * state_size, channels),
        buffer("dB", num_blocks * num_rows, whole_fours),
        buffer("dC", num_blocks * num_rows, whole_fours),
        buffer("dD", image_directions, channels),
        dz_rows,
        buffer("ddt_bias", image_directions, channels),
    ]
    launch_blocks(_scan_backward, shape, [*inputs, dout, states, *outputs])
    dx, ddt, dA, dB, dC, dD, _, ddt_bias = (output.tensor for output in outputs)

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
        None if dz is None else put(dz_rows, dz),
        whole(ddt_bias, *images).sum(0),
    )
