"""GPU kernels of the selective scan, in Triton, which comes with torch.

As the CPU kernels, one launch does all directions and everything around the scan, tensors are channels-last, and the
backward direction walks through time from the end. Directions run beside each other, each has its own results, and the
caller adds them up. At a few hundred tokens a plain loop over time with the states of
a block of channels in registers fills the chip, because images and channel blocks run in parallel. Names are those of
`selective_scan.py`; in the kernels

    a program is one image, block of channels and direction; a tile is (N, channels of the block), its states
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence
    everything is computed in float32, whatever the dtype of the inputs

The forward pass keeps the states at the start of every chunk of time. The backward pass computes every second one of
those in between again, one chunk at a time, into scratch memory, and the other ones where it needs them. Sums over
images or channel blocks are left to the caller, so that no result depends on the order in which programs run.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .backends import CHUNK_STEPS, states_shape
from .triton_launch import as_rows, launch

_CHUNK = CHUNK_STEPS["triton"]


class _Programs(NamedTuple):
    """How the work of a kernel is divided.

    Attributes:
        state_size: the largest one that this is for.
        channels: of a program.
        states: of a warp; 512 of them take 16 registers of a thread.
    """

    state_size: float
    channels: int
    states: int


# For each state size the fastest by the estimates of training/inspect_gpu_kernels.py, whatever the architecture. With
# up to 128 states at most 16 bytes of a thread's registers spill on sm_80, and none on sm_90.
_FORWARD = _Programs(8, 32, 1024), _Programs(16, 64, 1024), _Programs(math.inf, 32, 1024)
_BACKWARD = _Programs(32, 32, 512), _Programs(math.inf, 16, 256)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to the last digits, also where it is small; what is no number stays none.

    With u = exp(-|x|) and s = u / (2 + u), at most 1/3, log(1 + u) is 2 atanh(s), a short series."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _position(g, i, num_tokens):
    """Where step i is in the sequence."""
    return tl.where(g == 0, i, num_tokens - 1 - i)


@triton.jit
def _of_image(x, dt, B, C, z, dt_scale, x_row, dt_row, B_row, C_row, z_row, g, b, batch_size, num_tokens):
    """The inputs from the first token of the image on, and of the direction where it has its own.

    From there on, 32 bits are enough to find a token, and take fewer instructions and registers than 64."""
    first_row, first_of_direction = b * num_tokens, (g * batch_size + b) * num_tokens
    x, dt = x + first_of_direction * x_row, dt + first_of_direction * dt_row
    B, C = B + first_of_direction * B_row, C + first_of_direction * C_row
    return x, dt, B, C, z + first_row * z_row, dt_scale + first_row


@triton.jit
def _fetch(x, dt, B, C, t, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state):
    """What a step reads. It is fetched a step ahead, in the dtype that it has: to convert is to wait for it."""
    x_t = tl.load(x + t * x_row + e, is_channel, 0.0)
    dt_t = tl.load(dt + t * dt_row + e, is_channel, 0.0)
    B_t = tl.load(B + t * B_row + n, is_state, 0.0)
    C_t = tl.load(C + t * C_row + n, is_state, 0.0)
    return x_t, dt_t, B_t, C_t


@triton.jit
def _scan_forward(
    x, dt, A, B, C, D, z, dt_bias, dt_scale, out, states,
    batch_size, num_tokens, channels, state_size, num_chunks,
    x_row, dt_row, B_row, C_row, z_row,
    NUM_DIRECTIONS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP_STATES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    is_channel, is_state = e < channels, n < state_size
    is_tile = is_state[:, None] & is_channel[None, :]
    tile = (g * state_size + n[:, None]) * channels + e[None, :]
    A_tile = tl.load(A + tile, is_tile, 0.0)
    skip = tl.load(D + g * channels + e, is_channel, 0.0).to(tl.float32)
    bias = tl.load(dt_bias + g * channels + e, is_channel, 0.0).to(tl.float32)
    h = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
    x, dt, B, C, z, dt_scale = _of_image(
        x, dt, B, C, z, dt_scale, x_row, dt_row, B_row, C_row, z_row, g, b, batch_size, num_tokens
    )
    out += (g * batch_size + b) * num_tokens * channels
    next_t = _position(g, 0, num_tokens)
    next_x, next_dt, next_B, next_C = _fetch(
        x, dt, B, C, next_t, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
    )
    if HAS_Z:
        next_gate = tl.load(z + next_t * z_row + e, is_channel, 0.0)
    for i in range(num_tokens):
        t = _position(g, i, num_tokens)
        x_t, raw = next_x.to(tl.float32), next_dt.to(tl.float32) + bias
        B_t, C_t = next_B.to(tl.float32), next_C.to(tl.float32)
        # The last step fetches its own again.
        next_t = _position(g, tl.minimum(i + 1, num_tokens - 1), num_tokens)
        next_x, next_dt, next_B, next_C = _fetch(
            x, dt, B, C, next_t, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
        )
        if KEEP_STATES:
            if i % CHUNK == 0:
                kept = ((g * batch_size + b) * num_chunks + i // CHUNK) * state_size
                tl.store(states + (kept + n[:, None]) * channels + e[None, :], h, is_tile)
        delta = _softplus(raw)
        if HAS_SCALE:
            delta *= tl.load(dt_scale + t)
        h = tl.exp2(delta[None, :] * A_tile) * h + B_t[:, None] * (delta * x_t)[None, :]
        y = (tl.sum(h * C_t[:, None], 0) + skip * x_t) / NUM_DIRECTIONS
        if HAS_Z:
            gate = next_gate.to(tl.float32)
            next_gate = tl.load(z + next_t * z_row + e, is_channel, 0.0)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + t * channels + e, y, is_channel)


@triton.jit
def _pair(g, i, num_tokens):
    """Positions of steps i and i + 1 in a tile of shape (1, 2), and whether they are steps: there may be one only."""
    both = (i + tl.arange(0, 2))[None, :]
    return _position(g, both, num_tokens), both < num_tokens


@triton.jit
def _fetch_pair(first, second, first_row, second_row, g, i, num_tokens, e, is_channel):
    """Rows of two tensors at steps i and i + 1, each in a tile of shape (BLOCK, 2); zeros behind the last step."""
    t, is_step = _pair(g, i, num_tokens)
    here = is_channel[:, None] & is_step
    first_pair = tl.load(first + t * first_row + e[:, None], here, 0.0)
    second_pair = tl.load(second + t * second_row + e[:, None], here, 0.0)
    return first_pair, second_pair


@triton.jit
def _fetch_state_pair(B, B_row, g, i, num_tokens, n, state_size):
    """B (or C) at steps i and i + 1, one by one, because every thread needs that of its states at both."""
    first = tl.load(B + _position(g, i, num_tokens) * B_row + n, n < state_size, 0.0)
    size = tl.where(i + 1 < num_tokens, state_size, 0)
    second = tl.load(B + _position(g, i + 1, num_tokens) * B_row + n, n < size, 0.0)
    return first, second


@triton.jit
def _step_back(carried, dA_sum, before, decay, A_tile, delta, drive, dy, B_t, C_t):
    """The adjoint through one step, and the sums that its gradients are made of.

    `carried` is decay_{t+1} g_{t+1} before, decay_t g_t afterwards. Sums over states are (BLOCK,), others (N,)."""
    B_t, C_t = B_t.to(tl.float32), C_t.to(tl.float32)
    # In an order that keeps few tiles at a time: registers are what this kernel lacks
    after = decay * before + B_t[:, None] * drive[None, :]
    y = tl.sum(after * C_t[:, None], 0)
    d_C = tl.sum(after * dy[None, :], 1)
    adjoint = carried + dy[None, :] * C_t[:, None]
    d_B = tl.sum(adjoint * drive[None, :], 1)
    d_drive = tl.sum(adjoint * B_t[:, None], 0)
    carried = adjoint * decay
    d_exponent = carried * before
    dA_sum += d_exponent * delta[None, :]
    # A holds A log2(e), so its product with delta comes back by log(2)
    d_delta = tl.sum(d_exponent * A_tile, 0) * 0.6931471805599453
    return carried, dA_sum, d_drive, d_delta, y, d_B, d_C


@triton.jit
def _scan_backward(
    dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, scratch,
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias,
    batch_size, num_tokens, channels, state_size, num_chunks,
    dout_row, x_row, dt_row, B_row, C_row, z_row,
    NUM_DIRECTIONS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SCALE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block;
    dz (G*B*T, E) per direction.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}. It takes two
    steps at a time: the state between them stays in registers."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    g = tl.program_id(2)
    e = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    is_channel, is_state = e < channels, n < state_size
    is_tile = is_state[:, None] & is_channel[None, :]
    # Scratch holds the states before each pair of steps of a chunk: (programs, CHUNK / 2, N, BLOCK)
    local = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scratch += ((g * batch_size + b) * tl.num_programs(1) + block) * (CHUNK // 2) * STATE_BLOCK * BLOCK
    tile = (g * state_size + n[:, None]) * channels + e[None, :]
    A_tile = tl.load(A + tile, is_tile, 0.0)
    skip = tl.load(D + g * channels + e, is_channel, 0.0).to(tl.float32)[:, None]
    bias = tl.load(dt_bias + g * channels + e, is_channel, 0.0).to(tl.float32)[:, None]
    carried = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
    dA_sum = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
    dD_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    x, dt, B, C, z, dt_scale = _of_image(
        x, dt, B, C, z, dt_scale, x_row, dt_row, B_row, C_row, z_row, g, b, batch_size, num_tokens
    )
    first_row = (g * batch_size + b) * num_tokens
    dout += b * num_tokens * dout_row
    dx, ddt, dz = dx + first_row * channels, ddt + first_row * channels, dz + first_row * channels
    first_partial = (block * NUM_DIRECTIONS * batch_size * num_tokens + first_row) * state_size
    dB, dC = dB + first_partial, dC + first_partial
    for back in range(num_chunks):
        first = (num_chunks - 1 - back) * CHUNK
        pairs = tl.cdiv(tl.minimum(CHUNK, num_tokens - first), 2)

        kept = ((g * batch_size + b) * num_chunks + num_chunks - 1 - back) * state_size
        h = tl.load(states + (kept + n[:, None]) * channels + e[None, :], is_tile, 0.0)
        next_x, next_dt = _fetch_pair(x, dt, x_row, dt_row, g, first, num_tokens, e, is_channel)
        next_B_0, next_B_1 = _fetch_state_pair(B, B_row, g, first, num_tokens, n, state_size)
        for pair in range(pairs - 1):
            i = first + 2 * pair
            tl.store(scratch + pair * STATE_BLOCK * BLOCK + local, h)
            x_pair, delta = next_x.to(tl.float32), _softplus(next_dt.to(tl.float32) + bias)
            B_0, B_1 = next_B_0.to(tl.float32), next_B_1.to(tl.float32)
            next_x, next_dt = _fetch_pair(x, dt, x_row, dt_row, g, i + 2, num_tokens, e, is_channel)
            next_B_0, next_B_1 = _fetch_state_pair(B, B_row, g, i + 2, num_tokens, n, state_size)
            if HAS_SCALE:
                t, _ = _pair(g, i, num_tokens)
                delta *= tl.load(dt_scale + t)
            delta_0, delta_1 = tl.split(delta)
            drive_0, drive_1 = tl.split(delta * x_pair)
            h = tl.exp2(delta_0[None, :] * A_tile) * h + B_0[:, None] * drive_0[None, :]
            h = tl.exp2(delta_1[None, :] * A_tile) * h + B_1[:, None] * drive_1[None, :]
        tl.store(scratch + (pairs - 1) * STATE_BLOCK * BLOCK + local, h)
        tl.debug_barrier()  # another thread of the program may read what this one wrote

        last = first + 2 * (pairs - 1)
        next_x, next_dt = _fetch_pair(x, dt, x_row, dt_row, g, last, num_tokens, e, is_channel)
        next_dout, next_z = _fetch_pair(dout, z, dout_row, z_row, g, last, num_tokens, e, is_channel)
        for step in range(pairs):
            pair = pairs - 1 - step
            i = first + 2 * pair
            before = tl.load(scratch + pair * STATE_BLOCK * BLOCK + local)
            x_pair, raw = next_x.to(tl.float32), next_dt.to(tl.float32) + bias
            dout_pair, gate = next_dout.to(tl.float32) / NUM_DIRECTIONS, next_z.to(tl.float32)
            B_0, B_1 = _fetch_state_pair(B, B_row, g, i, num_tokens, n, state_size)
            C_0, C_1 = _fetch_state_pair(C, C_row, g, i, num_tokens, n, state_size)
            # The first pair fetches its own again.
            following = first + 2 * tl.maximum(pair - 1, 0)
            next_x, next_dt = _fetch_pair(x, dt, x_row, dt_row, g, following, num_tokens, e, is_channel)
            next_dout, next_z = _fetch_pair(dout, z, dout_row, z_row, g, following, num_tokens, e, is_channel)
            t, is_step = _pair(g, i, num_tokens)
            delta, slope = _softplus(raw), tl.sigmoid(raw)
            if HAS_SCALE:
                scale = tl.load(dt_scale + t, is_step, 0.0)
                delta *= scale
                slope *= scale
            delta = tl.where(is_step, delta, 0.0)  # no time passes behind the last step
            dy = dout_pair
            if HAS_Z:
                gate_sigmoid = tl.sigmoid(gate)
                dy = dout_pair * gate * gate_sigmoid
                # d silu(z) / dz = s (1 + z (1 - s))
                d_gate = dout_pair * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
            dD_sum += tl.sum(dy * x_pair, 1)
            delta_0, delta_1 = tl.split(delta)
            drive_0, drive_1 = tl.split(delta * x_pair)
            dy_0, dy_1 = tl.split(dy)
            decay_0, decay_1 = tl.exp2(delta_0[None, :] * A_tile), tl.exp2(delta_1[None, :] * A_tile)
            between = decay_0 * before + B_0.to(tl.float32)[:, None] * drive_0[None, :]
            carried, dA_sum, d_drive_1, d_delta_1, y_1, dB_1, dC_1 = _step_back(
                carried, dA_sum, between, decay_1, A_tile, delta_1, drive_1, dy_1, B_1, C_1
            )
            carried, dA_sum, d_drive_0, d_delta_0, y_0, dB_0, dC_0 = _step_back(
                carried, dA_sum, before, decay_0, A_tile, delta_0, drive_0, dy_0, B_0, C_0
            )
            d_drive = tl.join(d_drive_0, d_drive_1)
            d_dt = (tl.join(d_delta_0, d_delta_1) + d_drive * x_pair) * slope
            bias_sum += tl.sum(tl.where(is_step, d_dt, 0.0), 1)
            target, here = t * state_size + n[:, None], is_state[:, None] & is_step
            tl.store(dB + target, tl.join(dB_0, dB_1), here)
            tl.store(dC + target, tl.join(dC_0, dC_1), here)
            target, here = t * channels + e[:, None], is_channel[:, None] & is_step
            tl.store(dx + target, d_drive * delta + dy * skip, here)
            tl.store(ddt + target, d_dt, here)
            if HAS_Z:
                y = tl.join(y_0, y_1) + skip * x_pair
                tl.store(dz + target, d_gate * y, here)
        tl.debug_barrier()  # the next chunk overwrites the scratch memory
    image_direction = b * NUM_DIRECTIONS + g
    tl.store(dA + (image_direction * state_size + n[:, None]) * channels + e[None, :], dA_sum, is_tile)
    tl.store(dD + image_direction * channels + e, dD_sum, is_channel)
    tl.store(ddt_bias + image_direction * channels + e, bias_sum, is_channel)


# ---- tensors in, tensors out ----


def _scan_options(
    programs: tuple[_Programs, ...], x: Tensor, A: Tensor, z: Tensor | None, dt_scale: Tensor | None
) -> dict[str, int]:
    state_block = triton.next_power_of_2(A.shape[-1])
    _, block, states = next(choice for choice in programs if state_block <= choice.state_size)
    return {
        "NUM_DIRECTIONS": x.shape[0],
        "HAS_Z": z is not None,
        "HAS_SCALE": dt_scale is not None,
        "CHUNK": _CHUNK,
        "BLOCK": block,
        "STATE_BLOCK": state_block,
        "num_warps": max(1, state_block * block // states),
    }


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> list[Tensor]:
    """Rows for the kernels. What is absent decides nothing, so any tensor may stand for it."""
    A = (A.float().mT * 1.4426950408889634).contiguous()
    dt_bias = torch.zeros_like(D) if dt_bias is None else dt_bias.contiguous()
    z = x if z is None else z
    dt_scale = x if dt_scale is None else dt_scale.float().contiguous()
    num_tokens, (x, dt, B, C, z) = x.shape[2], (as_rows(tensor) for tensor in (x, dt, B, C, z))
    longest = max(tensor.stride(0) for tensor in (x, dt, B, C, z))
    if num_tokens * longest >= 2**31:
        raise ValueError(f"{num_tokens} tokens, {longest} elements apart: expected less than 2**31 elements an image")
    return [x, dt, A, B, C, D.contiguous(), z, dt_bias, dt_scale]


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
        the output `(B, T, E)` in the dtype of x, and the float32 states at the start of every chunk, which
        `scan_backward` needs; empty unless `keep_states`.
    """
    num_directions, batch_size, num_tokens, channels = x.shape
    inputs = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    states = torch.empty(states_shape("triton", x, A, keep_states), dtype=torch.float32, device=x.device)
    out = x.new_empty(x.shape)
    options = _scan_options(_FORWARD, x, A, z, dt_scale)
    launch(
        _scan_forward, (batch_size, triton.cdiv(channels, options["BLOCK"]), num_directions),
        *inputs, out, states,
        batch_size, num_tokens, channels, A.shape[-1], triton.cdiv(num_tokens, _CHUNK),
        *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        KEEP_STATES=keep_states, **options,
    )  # fmt: skip
    return _sum_of_directions(out), states


def _sum_of_directions(results: Tensor, out: Tensor | None = None) -> Tensor:
    """(G, B, T, E) -> (B, T, E), added up in float32; to `out` if it is given."""
    if out is None and results.shape[0] == 1:
        return results.squeeze(0)
    return torch.sum(results, 0, out=out)


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

    Those of x, dt and z are in their dtype, the others in float32. That of z is written to `dz` if that is given, and
    None if z is absent.
    """
    num_directions, batch_size, num_tokens, channels = x.shape
    options = _scan_options(_BACKWARD, x, A, z, dt_scale)
    state_size, num_blocks = A.shape[-1], triton.cdiv(channels, options["BLOCK"])
    inputs = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    dout = as_rows(dout)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    num_programs = num_directions * batch_size * num_blocks
    scratch = empty(num_programs, _CHUNK // 2, options["STATE_BLOCK"], options["BLOCK"])
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA = empty(batch_size, num_directions, state_size, channels)
    dB, dC = empty(num_blocks, *B.shape), empty(num_blocks, *C.shape)
    dD, ddt_bias = (empty(batch_size, num_directions, channels) for _ in range(2))
    dz_of_directions = None if z is None else z.new_empty(x.shape)
    launch(
        _scan_backward, (batch_size, num_blocks, num_directions),
        dout, *inputs, states, scratch, dx, ddt, dA, dB, dC, dD, dx if z is None else dz_of_directions, ddt_bias,
        batch_size, num_tokens, channels, state_size, triton.cdiv(num_tokens, _CHUNK),
        dout.stride(0), *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        **options,
    )  # fmt: skip
    dz = None if dz_of_directions is None else _sum_of_directions(dz_of_directions, dz)
    return dx, ddt, dA.sum(0).mT, dB.sum(0), dC.sum(0), dD.sum(0), dz, ddt_bias.sum(0)
