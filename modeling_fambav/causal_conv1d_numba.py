"""CPU kernels of the causal convolution before the scan, compiled by numba at first use.

Tensors are channels-last, and the backward direction looks ahead instead of back, so nothing is flipped or transposed.
Names and shapes are those of `selective_scan_numba.py`. A task first copies its tokens to a block of float32 that
stays in the cache, because every one of them is read by all taps of both directions.
"""

import numpy as np
import torch
from torch import Tensor

from .numba_channels import BLOCK, as_rows, as_rows_of_any, ceil_div, launch_blocks, pad_channels, row_dtype
from .numba_jobs import inlined, keep, kernel, next_task, open_job, rows, rows_of_any, scratch, sizes
from .numba_vectors import LANES, full, load, sigmoid, store

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


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
    num_blocks = ceil_div(channels, BLOCK)
    token_array = np.empty((num_tokens, BLOCK), np.float32)
    tokens = scratch(token_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * BLOCK
        stop = min(start + BLOCK, channels)
        _load_tokens(tokens, x, b, num_tokens, start, stop)
        for g in range(num_directions):
            for t in range(num_tokens):
                for e in range(start, stop, LANES):
                    u = _convolved(tokens, weight, bias, g, t, e, e - start, num_tokens, kernel_size)
                    store(out, (g * batch_size + b) * num_tokens + t, e, u * sigmoid(u))
    keep((token_array,))


@kernel
def _conv_backward(address):
    """Gradients. dweight (B*G*K, E) and dbias (B*G, E) are per image."""
    job = open_job(address, 7)
    num_directions, batch_size, num_tokens, channels, kernel_size = sizes(job)
    weight, bias, dweight, dbias = rows(job, 1), rows(job, 2), rows(job, 5), rows(job, 6)
    x, dout, dx = rows_of_any(job, 0), rows_of_any(job, 3), rows_of_any(job, 4)
    num_blocks = ceil_div(channels, BLOCK)
    token_array = np.empty((num_tokens, BLOCK), np.float32)
    du_array = np.empty((num_directions * num_tokens, BLOCK), np.float32)  # gradient before the SiLU
    tokens, du = scratch(token_array), scratch(du_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, task % num_blocks * BLOCK
        stop = min(start + BLOCK, channels)
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
    keep((token_array, du_array))


# ---- tensors in, tensors out ----


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    inputs = [as_rows_of_any(pad_channels(x)), as_rows(pad_channels(weight.mT)), as_rows(pad_channels(bias))]
    return inputs, (weight.shape[0], *x.shape[:2], inputs[0].shape[-1], weight.shape[-1])


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, _ = shape
    out = torch.empty(num_directions * batch_size * num_tokens, channels, dtype=row_dtype(x))
    launch_blocks(_conv_forward, shape, [*inputs, out])
    return out[:, : x.shape[-1]].contiguous().view(num_directions, *x.shape).to(x.dtype)


def conv_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in bfloat16 if x is and else in float32, and of weight and bias, in float32."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    dx = torch.empty(batch_size * num_tokens, channels, dtype=row_dtype(x))
    dweight = torch.empty(batch_size * num_directions * kernel_size, channels)
    dbias = torch.empty(batch_size * num_directions, channels)
    launch_blocks(_conv_backward, shape, [*inputs, as_rows_of_any(pad_channels(dout)), dx, dweight, dbias])
    dweight = dweight.view(batch_size, num_directions, kernel_size, channels).sum(0)
    dbias = dbias.view(batch_size, num_directions, channels).sum(0)
    width = x.shape[-1]
    return dx[:, :width].contiguous().view(x.shape), dweight[..., :width].mT, dbias[:, :width]
