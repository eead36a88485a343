"""GPU kernels of the selective scan, in Triton, which comes with torch.

As the CPU kernels, one launch does all directions and everything around the scan, tensors are channels-last, and the
backward direction walks through time from the end. At a few hundred tokens a plain loop over time with the states of
a block of channels in registers fills the chip, because images and channel blocks run in parallel. Names are those of
`selective_scan.py`; in the kernels

    a program is one image and one block of channels; a tile is (N, channels of the block), its states
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
from .triton_launch import OPTIONS, as_float32_rows

_CHUNK = CHUNK_STEPS["triton"]
# Channels of a program.
_BLOCK = 32


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _scan_forward(
    x, dt, A, B, C, D, z, dt_bias, dt_scale, out, states,
    batch_size, num_tokens, channels, state_size, num_chunks,
    x_row, dt_row, B_row, C_row, z_row,
    NUM_DIRECTIONS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP_STATES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    is_channel, is_state = e < channels, n < state_size
    is_tile = is_state[:, None] & is_channel[None, :]
    for g in tl.static_range(NUM_DIRECTIONS):
        tile = (g * state_size + n[:, None]) * channels + e[None, :]
        A_tile = tl.load(A + tile, is_tile, 0.0)
        skip = tl.load(D + g * channels + e, is_channel, 0.0).to(tl.float32)
        bias = tl.load(dt_bias + g * channels + e, is_channel, 0.0).to(tl.float32)
        h = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
        for i in range(num_tokens):
            t = i if g == 0 else num_tokens - 1 - i
            image_row = b * num_tokens + t
            row = g * batch_size * num_tokens + image_row
            if KEEP_STATES:
                if i % CHUNK == 0:
                    kept = ((g * batch_size + b) * num_chunks + i // CHUNK) * state_size
                    tl.store(states + (kept + n[:, None]) * channels + e[None, :], h, is_tile)
            x_t = tl.load(x + row * x_row + e, is_channel, 0.0).to(tl.float32)
            delta = _softplus(tl.load(dt + row * dt_row + e, is_channel, 0.0).to(tl.float32) + bias)
            if HAS_SCALE:
                delta *= tl.load(dt_scale + image_row)
            B_t = tl.load(B + row * B_row + n, is_state, 0.0).to(tl.float32)
            C_t = tl.load(C + row * C_row + n, is_state, 0.0).to(tl.float32)
            h = tl.exp2(delta[None, :] * A_tile) * h + B_t[:, None] * (delta * x_t)[None, :]
            y = tl.sum(h * C_t[:, None], 0) + skip * x_t
            # The direction before this one left its part here; the last one closes the gate.
            if g > 0:
                y += tl.load(out + image_row * channels + e, is_channel, 0.0)
            if g == NUM_DIRECTIONS - 1:
                y /= NUM_DIRECTIONS
                if HAS_Z:
                    gate = tl.load(z + image_row * z_row + e, is_channel, 0.0).to(tl.float32)
                    y *= gate * tl.sigmoid(gate)
            tl.store(out + image_row * channels + e, y, is_channel)


@triton.jit
def _scan_backward(
    dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, scratch,
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias,
    batch_size, num_tokens, channels, state_size, num_chunks,
    dout_row, x_row, dt_row, B_row, C_row, z_row,
    NUM_DIRECTIONS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SCALE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients. dA (B*G*N, E), dD and ddt_bias (B*G, E) are per image; dB and dC (blocks*G*B*T, N) per block.

    The adjoint g_t of the state runs backwards through the scan: g_t = C_t dy_t + decay_{t+1} g_{t+1}."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    e = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    is_channel, is_state = e < channels, n < state_size
    is_tile = is_state[:, None] & is_channel[None, :]
    # Scratch holds the states before each step of a chunk: (programs, CHUNK, N, BLOCK)
    local = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scratch += (b * tl.num_programs(1) + block) * CHUNK * STATE_BLOCK * BLOCK
    for g in tl.static_range(NUM_DIRECTIONS):
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
            for i in range(steps):
                t = first + i if g == 0 else num_tokens - 1 - first - i
                image_row = b * num_tokens + t
                row = g * batch_size * num_tokens + image_row
                tl.store(scratch + i * STATE_BLOCK * BLOCK + local, h)
                x_t = tl.load(x + row * x_row + e, is_channel, 0.0).to(tl.float32)
                delta = _softplus(tl.load(dt + row * dt_row + e, is_channel, 0.0).to(tl.float32) + bias)
                if HAS_SCALE:
                    delta *= tl.load(dt_scale + image_row)
                B_t = tl.load(B + row * B_row + n, is_state, 0.0).to(tl.float32)
                h = tl.exp2(delta[None, :] * A_tile) * h + B_t[:, None] * (delta * x_t)[None, :]
            tl.debug_barrier()  # another thread of the program may read what this one wrote

            for step in range(steps):
                i = steps - 1 - step
                t = first + i if g == 0 else num_tokens - 1 - first - i
                image_row = b * num_tokens + t
                row = g * batch_size * num_tokens + image_row
                before = tl.load(scratch + i * STATE_BLOCK * BLOCK + local)
                x_t = tl.load(x + row * x_row + e, is_channel, 0.0).to(tl.float32)
                raw = tl.load(dt + row * dt_row + e, is_channel, 0.0).to(tl.float32) + bias
                delta, slope = _softplus(raw), tl.sigmoid(raw)
                if HAS_SCALE:
                    scale = tl.load(dt_scale + image_row)
                    delta *= scale
                    slope *= scale
                B_t = tl.load(B + row * B_row + n, is_state, 0.0).to(tl.float32)
                C_t = tl.load(C + row * C_row + n, is_state, 0.0).to(tl.float32)
                dout_t = tl.load(dout + image_row * dout_row + e, is_channel, 0.0).to(tl.float32) / NUM_DIRECTIONS
                dy = dout_t
                if HAS_Z:
                    gate = tl.load(z + image_row * z_row + e, is_channel, 0.0).to(tl.float32)
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
                    if g > 0:
                        d_gate += tl.load(dz + image_row * channels + e, is_channel, 0.0)
                    tl.store(dz + image_row * channels + e, d_gate, is_channel)
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
        **OPTIONS,
    }


def _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> list[Tensor]:
    """Rows for the kernels. What is absent is not read, so any tensor may stand for it."""
    A = (A.float().mT * 1.4426950408889634).contiguous()
    dt_bias = torch.zeros_like(D) if dt_bias is None else dt_bias.contiguous()
    z = x if z is None else z
    dt_scale = x if dt_scale is None else dt_scale.float().contiguous()
    return [
        as_float32_rows(x),
        as_float32_rows(dt),
        A,
        as_float32_rows(B),
        as_float32_rows(C),
        D.contiguous(),
        as_float32_rows(z),
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
        the output `(B, T, E)`, and the float32 states at the start of every chunk, which `scan_backward` needs; empty
        unless `keep_states`.
    """
    _, batch_size, num_tokens, channels = x.shape
    inputs = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    states = torch.empty(states_shape("triton", x, A, keep_states), dtype=torch.float32, device=x.device)
    # float32, because the directions add up in it
    out = torch.empty(batch_size, num_tokens, channels, dtype=torch.float32, device=x.device)
    _scan_forward[(batch_size, triton.cdiv(channels, _BLOCK))](
        *inputs, out, states,
        batch_size, num_tokens, channels, A.shape[-1], triton.cdiv(num_tokens, _CHUNK),
        *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        KEEP_STATES=keep_states, **_scan_options(x, A, z, dt_scale),
    )  # fmt: skip
    return out.to(x.dtype), states


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
    """Gradients of x, dt, A, B, C, D, z and dt_bias, in float32; that of an absent z is None."""
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size, num_blocks = A.shape[-1], triton.cdiv(channels, _BLOCK)
    options = _scan_options(x, A, z, dt_scale)
    inputs = _scan_inputs(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    dout = as_float32_rows(dout)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    scratch = empty(batch_size * num_blocks, _CHUNK, options["STATE_BLOCK"], _BLOCK)
    dx, ddt = empty(*x.shape), empty(*x.shape)
    dA = empty(batch_size, num_directions, state_size, channels)
    dB, dC = empty(num_blocks, *B.shape), empty(num_blocks, *C.shape)
    dD, ddt_bias = (empty(batch_size, num_directions, channels) for _ in range(2))
    dz = empty(batch_size, num_tokens, channels)
    _scan_backward[(batch_size, num_blocks)](
        dout, *inputs, states, scratch, dx, ddt, dA, dB, dC, dD, dz, ddt_bias,
        batch_size, num_tokens, channels, state_size, triton.cdiv(num_tokens, _CHUNK),
        dout.stride(0), *(inputs[position].stride(0) for position in (0, 1, 3, 4, 6)),
        **options,
    )  # fmt: skip
    return dx, ddt, dA.sum(0).mT, dB.sum(0), dC.sum(0), dD.sum(0), None if z is None else dz, ddt_bias.sum(0)
