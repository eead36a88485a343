"""CPU kernels of the root-mean-square norm, compiled by numba at first use. A task is a run of tokens."""

import numpy as np
from torch import Tensor

from .numba_jobs import Operand, buffer, kernel, launch, next_task, open_job, rows, sizes
from .numba_vectors import LANES, full, load, load_scalar, reduce_sum, store, store_scalar

# Tokens of one task
_TOKENS = 64
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@kernel
def _forward(address):
    """x (tokens, D), weight (1, D), eps (1, 1) -> out (tokens, D), inverse (tokens, 1)."""
    job = open_job(address, 5)
    num_tokens, width, _, _, _ = sizes(job)
    x, weight, eps, out, inverse = rows(job, 0), rows(job, 1), rows(job, 2), rows(job, 3), rows(job, 4)
    while True:
        task = next_task(job)
        if task < 0:
            break
        for t in range(task * _TOKENS, min((task + 1) * _TOKENS, num_tokens)):
            squares = full(_ZERO)
            for d in range(0, width, LANES):
                x_t = load(x, t, d)
                squares = squares + x_t * x_t
            scale = _ONE / np.sqrt(reduce_sum(squares) / np.float32(width) + load_scalar(eps, 0, 0))
            store_scalar(inverse, t, 0, scale)
            for d in range(0, width, LANES):
                store(out, t, d, load(x, t, d) * full(scale) * load(weight, 0, d))


@kernel
def _backward(address):
    """dout, x (tokens, D), weight (1, D), inverse (tokens, 1) -> dx (tokens, D), dweight (tasks, D), zeros before."""
    job = open_job(address, 6)
    num_tokens, width, _, _, _ = sizes(job)
    dout, x, weight, inverse, dx, dweight = (
        rows(job, 0), rows(job, 1), rows(job, 2), rows(job, 3), rows(job, 4), rows(job, 5)
    )  # fmt: skip
    while True:
        task = next_task(job)
        if task < 0:
            break
        for t in range(task * _TOKENS, min((task + 1) * _TOKENS, num_tokens)):
            scale = load_scalar(inverse, t, 0)
            products = full(_ZERO)
            for d in range(0, width, LANES):
                products = products + load(dout, t, d) * load(weight, 0, d) * load(x, t, d)
            pull = full(reduce_sum(products) * scale * scale * scale / np.float32(width))
            for d in range(0, width, LANES):
                x_t, dout_t = load(x, t, d), load(dout, t, d)
                store(dx, t, d, dout_t * load(weight, 0, d) * full(scale) - x_t * pull)
                store(dweight, task, d, load(dweight, task, d) + dout_t * x_t * full(scale))


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `(..., D)`, and the inverse root mean square `(...)` of every token."""
    width = x.shape[-1]
    tokens = x.detach().contiguous().view(-1, width)
    num_tokens = tokens.shape[0]
    out, inverse = buffer("out", num_tokens, width), buffer("inverse", num_tokens, 1)
    inputs = [
        Operand("x", tokens, num_tokens, width),
        Operand("weight", weight.detach().contiguous().view(1, -1), 1, width),
        buffer("eps", 1, 1, fill=eps),
    ]
    launch(_forward, -(-num_tokens // _TOKENS), (num_tokens, width), [*inputs, out, inverse])
    return out.tensor.view(x.shape), inverse.tensor.view(x.shape[:-1])


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    width = x.shape[-1]
    tokens, dout = x.contiguous().view(-1, width), dout.contiguous().view(-1, width)
    num_tokens = tokens.shape[0]
    num_tasks = -(-num_tokens // _TOKENS)
    dx, dweight = buffer("dx", num_tokens, width), buffer("dweight", num_tasks, width, fill=0)
    inputs = [
        Operand("dout", dout, num_tokens, width),
        Operand("x", tokens, num_tokens, width),
        Operand("weight", weight.contiguous().view(1, -1), 1, width),
        Operand("inverse", inverse.contiguous().view(-1, 1), num_tokens, 1),
    ]
    launch(_backward, num_tasks, (num_tokens, width), [*inputs, dx, dweight])
    return dx.tensor.view(x.shape), dweight.tensor.sum(0)
