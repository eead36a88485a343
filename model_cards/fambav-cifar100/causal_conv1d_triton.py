"""GPU kernels of the causal convolution before the scan, in Triton, which comes with torch.

One launch does all directions, tensors are channels-last, and the backward direction looks ahead instead of back. A
program is one image, a few positions and a block of channels; everything is computed in float32, whatever the dtype of
the inputs. Names are those of `selective_scan.py`. Sums over images and positions are left to the caller, so that no
result depends on the order in which programs run.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .triton_launch import as_rows, launch


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
def _conv_backward(
    dout, x, weight, bias, dx, dweight, dbias, batch_size, num_tokens, channels, dout_row, x_row,
    NUM_DIRECTIONS: tl.constexpr, KERNEL_SIZE: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients. dweight (blocks of positions * B*G*K, E) and dbias (.. * B*G, E) are per image and block.

    What a token gives to its K neighbours is computed again for each of them, which needs no second pass."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_channel = e < channels
    here = (t < num_tokens)[:, None] & is_channel[None, :]
    x_t = tl.load(x + (b * num_tokens + t[:, None]) * x_row + e[None, :], here, 0.0).to(tl.float32)
    dx_t = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for g in tl.static_range(NUM_DIRECTIONS):
        direction = (tl.program_id(1) * batch_size + b) * NUM_DIRECTIONS + g
        for k in tl.static_range(KERNEL_SIZE):
            # The token that sees this one through tap k
            reader = t + (KERNEL_SIZE - 1 - k) if g == 0 else t - (KERNEL_SIZE - 1 - k)
            exists = ((reader >= 0) & (reader < num_tokens))[:, None] & here
            u = _convolved(x, weight, bias, b, reader, e, is_channel, num_tokens, channels, x_row, g, KERNEL_SIZE)
            s = tl.sigmoid(u)
            pointers = dout + ((g * batch_size + b) * num_tokens + reader[:, None]) * dout_row + e[None, :]
            du = tl.load(pointers, exists, 0.0).to(tl.float32) * s * (1.0 + u * (1.0 - s))
            w = tl.load(weight + (g * KERNEL_SIZE + k) * channels + e, is_channel, 0.0).to(tl.float32)
            dx_t += du * w[None, :]
            tl.store(dweight + (direction * KERNEL_SIZE + k) * channels + e, tl.sum(du * x_t, 0), is_channel)
            if k == KERNEL_SIZE - 1:  # through the last tap a token sees itself
                tl.store(dbias + direction * channels + e, tl.sum(du, 0), is_channel)
    tl.store(dx + (b * num_tokens + t[:, None]) * channels + e[None, :], dx_t, here)


# ---- tensors in, tensors out ----


def _conv_launch(x: Tensor, weight: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and options of the convolution kernels."""
    batch_size, num_tokens, channels = x.shape
    positions = min(16, triton.next_power_of_2(num_tokens))
    grid = (batch_size, triton.cdiv(num_tokens, positions), triton.cdiv(channels, 64))
    options = {"NUM_DIRECTIONS": weight.shape[0], "KERNEL_SIZE": weight.shape[-1], "POSITIONS": positions, "BLOCK": 64}
    return grid, options


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    grid, options = _conv_launch(x, weight)
    rows, weight, bias = as_rows(x), weight.mT.contiguous(), bias.contiguous()
    out = x.new_empty(weight.shape[0], *x.shape)
    launch(_conv_forward, grid, rows, weight, bias, out, *x.shape, rows.stride(0), **options)
    return out


def conv_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in float32."""
    grid, options = _conv_launch(x, weight)
    num_directions, channels, kernel_size = weight.shape
    rows, dout, weight, bias = as_rows(x), as_rows(dout), weight.mT.contiguous(), bias.contiguous()
    buffers = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, **buffers)
    dweight = torch.empty(grid[1] * x.shape[0], num_directions, kernel_size, channels, **buffers)
    dbias = torch.empty(grid[1] * x.shape[0], num_directions, channels, **buffers)
    launch(
        _conv_backward, grid,
        dout, rows, weight, bias, dx, dweight, dbias, *x.shape, dout.stride(0), rows.stride(0), **options,
    )  # fmt: skip
    return dx, dweight.sum(0).mT, dbias.sum(0)
