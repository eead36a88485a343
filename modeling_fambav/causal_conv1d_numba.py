"""CPU kernels of the causal convolution before the scan, compiled by numba at first use.

Tensors are channels-last, and the backward direction looks ahead instead of back, so nothing is flipped or transposed.
Names and shapes are those of `selective_scan_numba.py`. A task first copies its tokens to a block of float32 that
stays in the cache, because every one of them is read by all taps of both directions. There the sequence begins after
K - 1 tokens of zeros and ends before as many, so that no tap has to ask whether there is a token.
"""

import numpy as np
from torch import Tensor

from .numba_channels import (
    AHEAD,
    BLOCK,
    FLOATS,
    as_float32_rows,
    as_float_rows,
    ceil_div,
    fetch_block,
    first_channel,
    launch_blocks,
    pad_channels,
    put,
    row_dtype,
    rows_of,
)
from .numba_functions import sigmoid
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
from .numba_vectors import (
    WIDE,
    full_wide,
    load_wide,
    store,
)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _source(g, t, k, kernel_size):
    """Row of the padded block that tap k reads for position t. The last tap belongs to the token itself."""
    return t + k if g == 0 else t + 2 * (kernel_size - 1) - k


@inlined
def _load_tokens(tokens, x, b, num_tokens, start, kernel_size):
    """Copy a block of channels of one image to `tokens`, (K - 1 + T + K - 1, block)."""
    for t in range(num_tokens):
        for c in range(0, BLOCK, WIDE):
            store(tokens, t + kernel_size - 1, c, load_wide(x, b * num_tokens + t, start + c))


@inlined
def _convolved(tokens, weight, bias, g, t, start, c, kernel_size):
    """Before the SiLU."""
    total = load_wide(bias, g, start + c)
    for k in range(kernel_size):
        token = load_wide(tokens, _source(g, t, k, kernel_size), c)
        total = total + token * load_wide(weight, g * kernel_size + k, start + c)
    return total


@kernel
def _conv_forward(address):
    job = open_job(address, 4)
    num_directions, batch_size, num_tokens, channels, kernel_size = sizes(job)
    x, weight, bias, out = float_rows(job, 0), rows(job, 1), rows(job, 2), float_rows(job, 3)
    num_blocks = ceil_div(channels, BLOCK)
    token_array = np.zeros((num_tokens + 2 * (kernel_size - 1), BLOCK), np.float32)
    tokens = scratch(token_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, first_channel(task % num_blocks, channels)
        _load_tokens(tokens, x, b, num_tokens, start, kernel_size)
        for g in range(num_directions):
            for t in range(num_tokens):
                fetch_block(out, (g * batch_size + b) * num_tokens + t + AHEAD, start)
                for c in range(0, BLOCK, WIDE):
                    u = _convolved(tokens, weight, bias, g, t, start, c, kernel_size)
                    store(out, (g * batch_size + b) * num_tokens + t, start + c, u * sigmoid(u))
    keep((token_array,))


@kernel
def _conv_backward(address):
    """Gradients. dweight (B*G*K, E) and dbias (B*G, E) are per image."""
    job = open_job(address, 7)
    num_directions, batch_size, num_tokens, channels, kernel_size = sizes(job)
    weight, bias, dweight, dbias = rows(job, 1), rows(job, 2), rows(job, 5), rows(job, 6)
    x, dout, dx = float_rows(job, 0), float_rows(job, 3), float_rows(job, 4)
    num_blocks = ceil_div(channels, BLOCK)
    padded = num_tokens + 2 * (kernel_size - 1)
    token_array = np.zeros((padded, BLOCK), np.float32)
    du_array = np.zeros((num_directions * padded, BLOCK), np.float32)  # gradient before the SiLU
    tokens, du = scratch(token_array), scratch(du_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, start = task // num_blocks, first_channel(task % num_blocks, channels)
        _load_tokens(tokens, x, b, num_tokens, start, kernel_size)
        for g in range(num_directions):
            first = g * padded + kernel_size - 1
            for t in range(num_tokens):
                fetch_block(dout, (g * batch_size + b) * num_tokens + t + AHEAD, start)
                for c in range(0, BLOCK, WIDE):
                    u = _convolved(tokens, weight, bias, g, t, start, c, kernel_size)
                    s = sigmoid(u)
                    dout_t = load_wide(dout, (g * batch_size + b) * num_tokens + t, start + c)
                    store(du, first + t, c, dout_t * s * (full_wide(_ONE) + u * (full_wide(_ONE) - s)))
        for g in range(num_directions):
            first = g * padded + kernel_size - 1
            image_direction = b * num_directions + g
            for c in range(0, BLOCK, WIDE):
                total = full_wide(_ZERO)
                for t in range(num_tokens):
                    total = total + load_wide(du, first + t, c)
                store(dbias, image_direction, start + c, total)
                for k in range(kernel_size):
                    total = full_wide(_ZERO)
                    for t in range(num_tokens):
                        token = load_wide(tokens, _source(g, t, k, kernel_size), c)
                        total = total + load_wide(du, first + t, c) * token
                    store(dweight, image_direction * kernel_size + k, start + c, total)
        for t in range(num_tokens):
            fetch_block(dx, b * num_tokens + t + AHEAD, start)
            for c in range(0, BLOCK, WIDE):
                total = full_wide(_ZERO)
                for g in range(num_directions):
                    for k in range(kernel_size):
                        # The direction is turned round: what tap k reads for t, it also gives its gradient to
                        target = g * padded + _source(1 - g, t, k, kernel_size)
                        total = total + load_wide(du, target, c) * load_wide(weight, g * kernel_size + k, start + c)
                store(dx, b * num_tokens + t, start + c, total)
    keep((token_array, du_array))


# ---- tensors in, tensors out ----


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Operand], tuple[int, ...]]:
    """The tensors that both kernels begin with, as rows, and their shape."""
    num_directions, _, kernel_size = weight.shape
    x_rows = as_float_rows(pad_channels(x))
    channels = x_rows.shape[1]
    inputs = [
        Operand("x", x_rows, x.shape[0] * x.shape[1], channels, FLOATS),
        Operand("weight", as_float32_rows(pad_channels(weight.mT)), num_directions * kernel_size, channels),
        Operand("bias", as_float32_rows(pad_channels(bias)), num_directions, channels),
    ]
    return inputs, (num_directions, *x.shape[:2], channels, kernel_size)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` without gradients."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, _ = shape
    out = buffer("out", num_directions * batch_size * num_tokens, channels, row_dtype(x))
    launch_blocks(_conv_forward, shape, [*inputs, out])
    return out.tensor[:, : x.shape[-1]].contiguous().view(num_directions, *x.shape).to(x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype and written to `dx` if that is given, and of weight and bias, in float32."""
    inputs, shape = _conv_inputs(x, weight, bias)
    num_directions, batch_size, num_tokens, channels, kernel_size = shape
    num_rows = batch_size * num_tokens
    dout = Operand("dout", as_float_rows(pad_channels(dout)), num_directions * num_rows, channels, FLOATS)
    dx = x.new_empty(x.shape) if dx is None else dx
    dx_rows = rows_of("dx", dx, channels)
    dweight = buffer("dweight", batch_size * num_directions * kernel_size, channels)
    dbias = buffer("dbias", batch_size * num_directions, channels)
    launch_blocks(_conv_backward, shape, [*inputs, dout, dx_rows, dweight, dbias])
    dweight = dweight.tensor.view(batch_size, num_directions, kernel_size, channels).sum(0)
    dbias = dbias.tensor.view(batch_size, num_directions, channels).sum(0)
    width = x.shape[-1]
    return put(dx_rows, dx), dweight[..., :width].mT, dbias[:, :width]
