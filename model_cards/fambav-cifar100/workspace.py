"""Memory for what an operator forgets when it returns, kept for its next call on a CPU.

The temporary tensors of a mixer are as large as all that it keeps for the backward pass. Allocated among those, and of
another size after every fusion, they leave holes that nothing fits into: a quarter of the memory of a training step.
On a GPU, torch's own allocator does this.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_CACHE_LINE = 64  # bytes
# Between two tensors, so that those of whole pages do not all begin at the same place of a page, and of a cache
_GAP = 9 * _CACHE_LINE


class _Workspace(threading.local):
    """Of one thread: the memory, how much of it is taken, and whether temporary tensors come from it now."""

    def __init__(self):
        self.memory: Tensor | None = None
        self.taken = 0  # bytes, of which the memory may have fewer
        self.largest = 0
        self.is_open = False


_workspace = _Workspace()


@contextlib.contextmanager
def temporaries() -> Iterator[None]:
    """Within it, `temporary` gives memory that the thread's next use of `temporaries` gives again.

    Nothing made there may leave the operator, nor be kept by it.
    """
    space = _workspace
    size = 0 if space.memory is None else space.memory.numel()
    if space.largest > size:
        space.memory = None  # before there is the new one
        # A tensor of inference mode could not be written to outside of it
        with torch.inference_mode(False):
            space.memory = torch.empty(space.largest, dtype=torch.uint8, device="cpu")
    space.taken, space.is_open = 0, True
    try:
        yield
    finally:
        space.is_open = False


def temporary(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor with any contents: a new one, but on a CPU within `temporaries`."""
    space = _workspace
    if not space.is_open or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    first, num_bytes = space.taken, math.prod(shape) * dtype.itemsize
    space.taken = first + -(-num_bytes // _CACHE_LINE) * _CACHE_LINE + _GAP
    space.largest = max(space.largest, space.taken)
    if space.memory is None or space.taken > space.memory.numel():
        return torch.empty(shape, dtype=dtype, device=device)  # the next use has room for it
    return space.memory[first : first + num_bytes].view(dtype).view(shape)
