"""Rows of channels: how the CPU kernels of the scan and of the convolution see tensors, and how they share them out.

A task is one image and one block of channels. Sums over images or blocks are left to the caller, so that results do
not depend on the number of threads.

The last block ends with the channels, so it may begin within the one before. Both write the same bits of the channels
that both have, and sums over a block count these once. So no output may share memory with an input: one of the two
would read what the other has written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .numba_jobs import Operand, buffer, inlined, launch
from .numba_vectors import LANES, prefetch

# Dtypes of rows with a value per token and channel.
FLOATS = (torch.float32, torch.bfloat16)
# Channels of one task, so that a step reads runs of whole cache lines.
BLOCK = 64
# Rows from the one that is worked on to the one that is fetched from memory meanwhile. The distance between rows is
# that of whole tokens, which processors do not foresee.
AHEAD = 4


@inlined
def ceil_div(number, divisor):
    return (number + divisor - 1) // divisor


@inlined
def first_channel(block, channels):
    """Where a block begins."""
    return min(block * BLOCK, channels - BLOCK)


@inlined
def mark_own(own, block, channels):
    """Write 1 for every channel of a block that no block before it has, and 0 for the others."""
    shared = block * BLOCK - first_channel(block, channels)
    own[0, :shared] = 0.0
    own[0, shared:] = 1.0


@inlined
def fetch_block(rows, row, start):
    """Begin to bring a block of channels of one row, if there is such a row, into the cache."""
    for c in range(0, BLOCK, LANES):
        prefetch(rows, row, start + c)


def row_dtype(tensor: Tensor) -> torch.dtype:
    """Of the rows of a tensor with a value per token and channel: bfloat16 if it is that, else float32."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32


def as_float_rows(tensor: Tensor) -> Tensor:
    """In `row_dtype`, everything but the last dimension as rows; a view wherever the strides allow it."""
    dtype = row_dtype(tensor)
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def as_float32_rows(tensor: Tensor) -> Tensor:
    """As `as_float_rows`, but always float32."""
    return as_float_rows(tensor.float())


def pad_channels(tensor: Tensor) -> Tensor:
    """Zeros up to one block, if there are fewer channels; the padded ones stay zero all the way."""
    missing = BLOCK - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing > 0 else tensor


def rows_of(name: str, place: Tensor, channels: int) -> Operand:
    """Rows for a result that belongs in `place`, `(B, T, E)`: its own where a kernel can write them, else new ones."""
    num_rows = place.shape[0] * place.shape[1]
    if place.dtype == row_dtype(place) and place.shape[-1] == channels:
        return Operand(name, place.flatten(0, 1), num_rows, channels, FLOATS)
    return buffer(name, num_rows, channels, row_dtype(place))


def put(result: Operand, place: Tensor) -> Tensor:
    """`place` with the rows of `rows_of`, once a kernel has written them."""
    if result.tensor.data_ptr() != place.data_ptr():
        place.copy_(result.tensor[:, : place.shape[-1]].view(place.shape))
    return place


def launch_blocks(kernel, shape: tuple[int, ...], operands: list[Operand]) -> None:
    """Run a kernel on rows. `shape` is (G, B, T, E, N or K)."""
    launch(kernel, shape[1] * -(-shape[3] // BLOCK), shape, operands)
