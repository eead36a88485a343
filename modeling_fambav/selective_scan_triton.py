"""GPU kernels of the selective scan, in Triton, which comes with torch.

As the CPU kernels, one launch does all directions and everything around the scan, tensors are channels-last, and the
backward direction walks through time from the end. Directions run beside each other, each has its own results, and the
caller adds them up. At a few hundred tokens a plain loop over time with the states of
a block of channels in registers fills the chip, because images and channel blocks run in parallel. Names are those of
`selective_scan.py`; in the kernels

    a program is one image, block of channels and direction; a tile is (N, channels of the block), its states
    i counts steps of a scan, t = i or T - 1 - i is the position in the sequence
    everything is computed in float32, whatever the dtype of the inputs

The forward pass keeps the states at the start of every chunk of time. The backward pass computes those in between
again, one chunk at a time, into scratch memory that stays in the second-level cache. Sums over images or channel
blocks are left to the caller, so that no result depends on the order in which programs run.
"""

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
# Channels of a program.
_BLOCK = 32


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
def _rows(g, b, i, batch_size, num_tokens):
    """Where step i is in tensors of all images, and in those of all directions."""
    image_row = b * num_tokens + tl.where(g == 0, i, num_tokens - 1 - i)
    return image_row, g * batch_size * num_tokens + image_row


@triton.jit
def _fetch(x, dt, B, C, row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state):
    """What a step reads. It is fetched a step ahead, in the dtype that it has: to convert is to wait for it."""
    x_t = tl.load(x + row * x_row + e, is_channel, 0.0)
    dt_t = tl.load(dt + row * dt_row + e, is_channel, 0.0)
    B_t = tl.load(B + row * B_row + n, is_state, 0.0)
    C_t = tl.load(C + row * C_row + n, is_state, 0.0)
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
    next_image_row, next_row = _rows(g, b, 0, batch_size, num_tokens)
    next_x, next_dt, next_B, next_C = _fetch(
        x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
    )
    if HAS_Z:
        next_gate = tl.load(z + next_image_row * z_row + e, is_channel, 0.0)
    for i in range(num_tokens):
        image_row, row = _rows(g, b, i, batch_size, num_tokens)
        x_t, raw = next_x.to(tl.float32), next_dt.to(tl.float32) + bias
        B_t, C_t = next_B.to(tl.float32), next_C.to(tl.float32)
        # The last step fetches its own again.
        next_image_row, next_row = _rows(g, b, tl.minimum(i + 1, num_tokens - 1), batch_size, num_tokens)
        next_x, next_dt, next_B, next_C = _fetch(
            x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
        )
        if KEEP_STATES:
            if i % CHUNK == 0:
                kept = ((g * batch_size + b) * num_chunks + i // CHUNK) * state_size
                tl.store(states + (kept + n[:, None]) * channels + e[None, :], h, is_tile)
        delta = _softplus(raw)
        if HAS_SCALE:
            delta *= tl.load(dt_scale + image_row)
        h = tl.exp2(delta[None, :] * A_tile) * h + B_t[:, None] * (delta * x_t)[None, :]
        y = (tl.sum(h * C_t[:, None], 0) + skip * x_t) / NUM_DIRECTIONS
        if HAS_Z:
            gate = next_gate.to(tl.float32)
            next_gate = tl.load(z + next_image_row * z_row + e, is_channel, 0.0)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + row * channels + e, y, is_channel)


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

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    g = tl.program_id(2)
    e = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    is_channel, is_state = e < channels, n < state_size
    is_tile = is_state[:, None] & is_channel[None, :]
    # Scratch holds the states before each step of a chunk: (programs, CHUNK, N, BLOCK)
    local = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scratch += ((g * batch_size + b) * tl.num_programs(1) + block) * CHUNK * STATE_BLOCK * BLOCK
    tile = (g * state_size + n[:, None]) * channels + e[None, :]
    A_tile = tl.load(A + tile, is_tile, 0.0)
    skip = tl.load(D + g * channels + e, is_channel, 0.0).to(tl.float32)
    bias = tl.load(dt_bias + g * channels + e, is_channel, 0.0).to(tl.float32)
    carried = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)  # decay_{t+1} g_{t+1}
    dA_sum = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
    dD_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for back in range(num_chunks):
        first = (num_chunks - 1 - back) * CHUNK
        steps = tl.minimum(CHUNK, num_tokens - first)

        kept = ((g * batch_size + b) * num_chunks + num_chunks - 1 - back) * state_size
        h = tl.load(states + (kept + n[:, None]) * channels + e[None, :], is_tile, 0.0)
        _, next_row = _rows(g, b, first, batch_size, num_tokens)
        next_x, next_dt, next_B, _ = _fetch(
            x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
        )
        for i in range(steps):
            image_row, _ = _rows(g, b, first + i, batch_size, num_tokens)
            tl.store(scratch + i * STATE_BLOCK * BLOCK + local, h)
            x_t, B_t = next_x.to(tl.float32), next_B.to(tl.float32)
            delta = _softplus(next_dt.to(tl.float32) + bias)
            _, next_row = _rows(g, b, first + tl.minimum(i + 1, steps - 1), batch_size, num_tokens)
            next_x, next_dt, next_B, _ = _fetch(
                x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
            )
            if HAS_SCALE:
                delta *= tl.load(dt_scale + image_row)
            h = tl.exp2(delta[None, :] * A_tile) * h + B_t[:, None] * (delta * x_t)[None, :]
        tl.debug_barrier()  # another thread of the program may read what this one wrote

        next_image_row, next_row = _rows(g, b, first + steps - 1, batch_size, num_tokens)
        next_x, next_dt, next_B, next_C = _fetch(
            x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
        )
        next_dout = tl.load(dout + next_image_row * dout_row + e, is_channel, 0.0)
        if HAS_Z:
            next_gate = tl.load(z + next_image_row * z_row + e, is_channel, 0.0)
        for step in range(steps):
            i = steps - 1 - step
            image_row, row = _rows(g, b, first + i, batch_size, num_tokens)
            before = tl.load(scratch + i * STATE_BLOCK * BLOCK + local)
            x_t, raw = next_x.to(tl.float32), next_dt.to(tl.float32) + bias
            B_t, C_t = next_B.to(tl.float32), next_C.to(tl.float32)
            dout_t = next_dout.to(tl.float32) / NUM_DIRECTIONS
            next_image_row, next_row = _rows(g, b, first + tl.maximum(i - 1, 0), batch_size, num_tokens)
            next_x, next_dt, next_B, next_C = _fetch(
                x, dt, B, C, next_row, x_row, dt_row, B_row, C_row, e, n, is_channel, is_state
            )
            next_dout = tl.load(dout + next_image_row * dout_row + e, is_channel, 0.0)
            delta, slope = _softplus(raw), tl.sigmoid(raw)
            if HAS_SCALE:
                scale = tl.load(dt_scale + image_row)
                delta *= scale
                slope *= scale
            dy = dout_t
            if HAS_Z:
                gate = next_gate.to(tl.float32)
                next_gate = tl.load(z + next_image_row * z_row + e, is_channel, 0.0)
                gate_sigmoid = tl.sigmoid(gate)
                dy = dout_t * gate * gate_sigmoid
            drive = delta * x_t
            decay = tl.exp2(delta[None, :] * A_tile)
            after = decay * before + B_t[:, None] * drive[None, :]
            adjoint = carried + dy[None, :] * C_t[:, None]
            carried = adjoint * decay
            d_exponent = carried * before
            d_drive = tl.sum(adjoint * B_t[:, None], 0)
            # A holds A log2(e), so its product with delta comes back by log(2)
            d_delta = tl.sum(d_exponent * A_tile, 0) * 0.6931471805599453 + d_drive * x_t
            dA_sum += d_exponent * delta[None, :]
            dD_sum += dy * x_t
            d_dt = d_delta * slope
            bias_sum += d_dt
            partial = (block * NUM_DIRECTIONS * batch_size * num_tokens + row) * state_size
            tl.store(dB + partial + n, tl.sum(adjoint * drive[None, :], 1), is_state)
            tl.store(dC + partial + n, tl.sum(after * dy[None, :], 1), is_state)
            tl.store(dx + row * channels + e, d_drive * delta + dy * skip, is_channel)
            tl.store(ddt + row * channels + e, d_dt, is_channel)
            if HAS_Z:
                y = tl.sum(after * C_t[:, None], 0) + skip * x_t
                # d silu(z) / dz = s (1 + z (1 - s))
                d_gate = dout_t * y * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
                tl.store(dz + row * channels + e, d_gate, is_channel)
        tl.debug_barrier()  # the next chunk overwrites the scratch memory
    image_direction = b * NUM_DIRECTIONS + g
    tl.store(dA + (image_direction * state_size + n[:, None]) * channels + e[None, :], dA_sum, is_tile)
    tl.store(dD + image_direction * channels + e, dD_sum, is_channel)
    tl.store(ddt_bias + image_direction * channels + e, bias_sum, is_channel)


# ---- tensors in, tensors out ----


def _scan_options(x: Tensor, A: Tensor, z: Tensor | None, dt_scale: Tensor | None) -> dict[str, int]:
    state_block = triton.next_power_of_2(A.shape[-1])
    return {
        "NUM_DIRECTIONS": x.shape[0],
        "HAS_Z": z is not None,
        "HAS_SCALE": dt_scale is not None,
        "CHUNK": _CHUNK,
        "BLOCK": _BLOCK,
        "STATE_BLOCK": state_block,
        # At most 16 states a lane: more spill registers in the backward pass
        "num_warps": max(1, state_block * _BLOCK // 512),
    }


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> list[Tensor]:
    """Rows for the kernels. What is absent is not read, so any tensor may stand for it."""
    A = (A.float().mT * 1.4426950408889634).contiguous()
    dt_bias = torch.zeros_like(D) if dt_bias is None else dt_bias.contiguous()
    z = x if z is None else z
    dt_scale = x if dt_scale is None else dt_scale.float().contiguous()
    return [
        as_rows(x),
        as_rows(dt),
        A,
        as_rows(B),
        as_rows(C),
        D.contiguous(),
        as_rows(z),
        dt_bias,
        dt_scale,
    ]


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
    launch(
        _scan_forward, (batch_size, triton.cdiv(channels, _BLOCK), num_directions),
        *inputs, out, states,
        batch_size, num_tokens, channels, A.shape[-1], triton.cdiv(num_tokens, _CHUNK),
        *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        KEEP_STATES=keep_states, **_scan_options(x, A, z, dt_scale),
    )  # fmt: skip
    return _sum_of_directions(out), states


def _sum_of_directions(results: Tensor) -> Tensor:
    """(G, B, T, E) -> (B, T, E), added up in float32."""
    return results.squeeze(0) if results.shape[0] == 1 else results.sum(0)


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
    """Gradients of x, dt, A, B, C, D, z and dt_bias.

    Those of x, dt and z are in their dtype, the others in float32; that of an absent z is None.
    """
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size, num_blocks = A.shape[-1], triton.cdiv(channels, _BLOCK)
    options = _scan_options(x, A, z, dt_scale)
    inputs = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    dout = as_rows(dout)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    scratch = empty(num_directions * batch_size * num_blocks, _CHUNK, options["STATE_BLOCK"], _BLOCK)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA = empty(batch_size, num_directions, state_size, channels)
    dB, dC = empty(num_blocks, *B.shape), empty(num_blocks, *C.shape)
    dD, ddt_bias = (empty(batch_size, num_directions, channels) for _ in range(2))
    dz = None if z is None else z.new_empty(x.shape)
    launch(
        _scan_backward, (batch_size, num_blocks, num_directions),
        dout, *inputs, states, scratch, dx, ddt, dA, dB, dC, dD, dx if dz is None else dz, ddt_bias,
        batch_size, num_tokens, channels, state_size, triton.cdiv(num_tokens, _CHUNK),
        dout.stride(0), *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        **options,
    )  # fmt: skip
    dz = None if dz is None else _sum_of_directions(dz)
    return dx, ddt, dA.sum(0).mT, dB.sum(0), dC.sum(0), dD.sum(0), dz, ddt_bias.sum(0)
