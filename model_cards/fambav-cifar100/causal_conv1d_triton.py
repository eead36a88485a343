"""GPU kernels of the causal convolution before the scan, in Triton, which comes with torch.

One launch does all directions, tensors are channels-last, and the backward direction looks ahead instead of back. A
program is one image, a few positions and a block of channels; everything is computed in float32, whatever the dtype of
the inputs. Names are those of `selective_scan.py`. Sums over programs are left to the caller, so that no result
depends on the order in which they run.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .triton_launch import as_rows, launch

_BLOCK = 64  # channels of a program
# Of the backward pass. Longer chunks repeat less at their ends, more of them fill the chip
CHUNK = 48  # positions of a program, at most; a multiple of STEPS
STEPS = 4  # positions of a pass: as many as taps, after which no window has to move from register to register


@triton.jit
def _convolved(
    x, weight, bias, b, t, e, is_channel, num_tokens, channels, x_row,
    G: tl.constexpr, KERNEL_SIZE: tl.constexpr,
):  # fmt: skip
    """Before the SiLU, for a vector of positions t: (positions, channels)."""
    is_position = (t >= 0) & (t < num_tokens)
    total = tl.load(bias + G * channels + e, is_channel, 0.0).to(tl.float32)[None, :]
    for k in tl.static_range(KERNEL_SIZE):
        source = t - (KERNEL_SIZE - 1 - k) if G == 0 else t + (KERNEL_SIZE - 1 - k)
        exists = is_position & (source >= 0) & (source < num_tokens)
        pointers = x + (b * num_tokens + source[:, None]) * x_row + e[None, :]
        x_s = tl.load(pointers, exists[:, None] & is_channel[None, :], 0.0).to(tl.float32)
        w = tl.load(weight + (G * KERNEL_SIZE + k) * channels + e, is_channel, 0.0).to(tl.float32)
        total += x_s * w[None, :]
    return total


@triton.jit
def _conv_forward(
    x, weight, bias, out, batch_size, num_tokens, channels, x_row,
    NUM_DIRECTIONS: tl.constexpr, KERNEL_SIZE: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_channel = e < channels
    for g in tl.static_range(NUM_DIRECTIONS):
        u = _convolved(x, weight, bias, b, t, e, is_channel, num_tokens, channels, x_row, g, KERNEL_SIZE)
        pointers = out + ((g * batch_size + b) * num_tokens + t[:, None]) * channels + e[None, :]
        tl.store(pointers, u * tl.sigmoid(u), (t < num_tokens)[:, None] & is_channel[None, :])


@triton.jit
def _fetch(
    x, dout, dout_ahead, p, first, end, x_row, dout_row, e, channels,
    NUM_DIRECTIONS: tl.constexpr, KERNEL_SIZE: tl.constexpr,
):  # fmt: skip
    """What `_move_on` to position p reads, in the dtype that it has, of an image from position first to end.

    Those are token p + K - 1, its dout of direction 0, and dout of token p of direction 1, which looks ahead. Masks
    compare vectors, because the interpreter takes none that comes from scalars alone."""
    newest = p + (KERNEL_SIZE - 1)
    exists = e < tl.where((newest >= first) & (newest < end), channels, 0)
    fetched = (tl.load(x + newest * x_row + e, exists, 0.0), tl.load(dout + newest * dout_row + e, exists, 0.0))
    if NUM_DIRECTIONS == 2:
        exists = e < tl.where((p >= first) & (p < end), channels, 0)
        fetched += (tl.load(dout_ahead + p * dout_row + e, exists, 0.0),)
    return fetched


@triton.jit
def _move_on(tokens, du, fetched, taps, biases, NUM_DIRECTIONS: tl.constexpr, KERNEL_SIZE: tl.constexpr):
    """The windows of `_conv_backward` at the next position: the oldest go out, the newest come in."""
    tokens = tokens[1:] + (fetched[0].to(tl.float32),)
    for g in tl.static_range(NUM_DIRECTIONS):
        u = biases[g]
        for k in tl.static_range(KERNEL_SIZE):
            u += taps[g * KERNEL_SIZE + k] * tokens[k]
        s = tl.sigmoid(u)
        du = du[1:] + (fetched[1 + g].to(tl.float32) * s * (1.0 + u * (1.0 - s)),)
    return tokens, du


@triton.jit
def _conv_backward(
    dout, x, weight, bias, dx, sums, batch_size, num_tokens, channels, dout_row, x_row,
    NUM_DIRECTIONS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients. sums (B * chunks of an image, G, K + 1, E) has those of the taps, then that of the bias.

    A program walks through a chunk and reads everything once, as it keeps two windows in registers: tokens p to
    p + K - 1, and du, the gradients before the SiLU of the tokens that see token p, K of each direction in turn, the
    oldest first. Direction 0 has come to p + K - 1 by then and direction 1 to p, so both convolve the same tokens, the
    latter with its taps turned round. Positions count from the start of the chunk, where 32 bits are enough."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_channel = e < channels
    # A pass that begins in a chunk ends in it, or behind the last token, where everything is zero
    positions = tl.cdiv(num_tokens, tl.num_programs(1) * STEPS) * STEPS
    before = tl.program_id(1) * positions
    after = num_tokens - before
    dout_ahead = dout + ((batch_size + b) * num_tokens + before) * dout_row
    dout += (b * num_tokens + before) * dout_row
    x += (b * num_tokens + before) * x_row
    dx += (b * num_tokens + before) * channels
    zero = tl.zeros((BLOCK,), tl.float32)
    taps, biases = (), ()
    for g in tl.static_range(NUM_DIRECTIONS):
        biases += (tl.load(bias + g * channels + e, is_channel, 0.0).to(tl.float32),)
        for k in tl.static_range(KERNEL_SIZE):
            tap = g * KERNEL_SIZE + (k if g == 0 else KERNEL_SIZE - 1 - k)
            taps += (tl.load(weight + tap * channels + e, is_channel, 0.0).to(tl.float32),)
    tokens, du = (zero,) * KERNEL_SIZE, (zero,) * (NUM_DIRECTIONS * KERNEL_SIZE)
    tap_sums, bias_sums = (zero,) * (NUM_DIRECTIONS * KERNEL_SIZE), (zero,) * NUM_DIRECTIONS
    # The K - 1 positions before the chunk fill du, and those before them the tokens that these see
    for p in tl.static_range(2 - 2 * KERNEL_SIZE, 0):
        row = _fetch(
            x, dout, dout_ahead, p, -before, after, x_row, dout_row, e, channels, NUM_DIRECTIONS, KERNEL_SIZE
        )  # fmt: skip
        tokens, du = _move_on(tokens, du, row, taps, biases, NUM_DIRECTIONS, KERNEL_SIZE)
    for start in range(0, tl.minimum(positions, after), STEPS):
        # No load may pass a store, so those of a pass come first and wait for memory together
        rows = ()
        for step in tl.static_range(STEPS):
            rows += (_fetch(
                x, dout, dout_ahead, start + step, 0, after, x_row, dout_row, e, channels, NUM_DIRECTIONS, KERNEL_SIZE
            ),)  # fmt: skip
        for step in tl.static_range(STEPS):
            tokens, du = _move_on(tokens, du, rows[step], taps, biases, NUM_DIRECTIONS, KERNEL_SIZE)
            dx_p = zero
            for g in tl.static_range(NUM_DIRECTIONS):
                for k in tl.static_range(KERNEL_SIZE):
                    # Of the token that sees this one through tap k
                    du_k = du[(KERNEL_SIZE - 1 - k) * NUM_DIRECTIONS + g]
                    dx_p += du_k * taps[g * KERNEL_SIZE + k]
                    # Sums come to the front in turn, and go back to the end
                    tap_sums = tap_sums[1:] + (tap_sums[0] + du_k * tokens[0],)
                bias_sums = bias_sums[1:] + (bias_sums[0] + du[0 if g == 0 else -1],)
            tl.store(dx + (start + step) * channels + e, dx_p, e < tl.where(start + step < after, channels, 0))
    sums += (b * tl.num_programs(1) + tl.program_id(1)) * NUM_DIRECTIONS * (KERNEL_SIZE + 1) * channels + e
    for g in tl.static_range(NUM_DIRECTIONS):
        for k in tl.static_range(KERNEL_SIZE):
            tap = k if g == 0 else KERNEL_SIZE - 1 - k
            tl.store(sums + (g * (KERNEL_SIZE + 1) + tap) * channels, tap_sums[g * KERNEL_SIZE + k], is_channel)
        tl.store(sums + (g * (KERNEL_SIZE + 1) + KERNEL_SIZE) * channels, bias_sums[g], is_channel)


# ---- tensors in, tensors out ----


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    batch_size, num_tokens, channels = x.shape
    rows, weight, bias = as_rows(x), weight.mT.contiguous(), bias.contiguous()
    out = x.new_empty(weight.shape[0], *x.shape)
    positions = min(16, triton.next_power_of_2(num_tokens))
    launch(
        _conv_forward, (batch_size, triton.cdiv(num_tokens, positions), triton.cdiv(channels, _BLOCK)),
        rows, weight, bias, out, *x.shape, rows.stride(0),
        NUM_DIRECTIONS=weight.shape[0], KERNEL_SIZE=weight.shape[1], POSITIONS=positions, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype and written to `dx` if that is given, and of weight and bias, in float32."""
    batch_size, num_tokens, channels = x.shape
    num_directions, _, kernel_size = weight.shape
    rows, dout, weight, bias = as_rows(x), as_rows(dout), weight.mT.contiguous(), bias.contiguous()
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    dx_rows = x.new_empty(x.shape)
    sums = x.new_empty(batch_size * num_chunks, num_directions, kernel_size + 1, channels, dtype=torch.float32)
    launch(
        _conv_backward, (batch_size, num_chunks, triton.cdiv(channels, _BLOCK)),
        dout, rows, weight, bias, dx_rows, sums, *x.shape, dout.stride(0), rows.stride(0),
        NUM_DIRECTIONS=num_directions, KERNEL_SIZE=kernel_size, STEPS=STEPS, BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    sums = sums.sum(0)
    dx = dx_rows if dx is None else dx.copy_(dx_rows)
    return dx, sums[:, :-1].mT, sums[:, -1]
