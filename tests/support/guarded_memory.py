"""A plugin of pytest: every tensor of a CPU kernel lies between two pages of memory that nobody may touch.

    python -m pytest -p support.guarded_memory tests/modeling_fambav/test_rms_norm.py

Each launch runs twice, on copies that end right before such a page and on copies that begin right behind one; a kernel
that reads or writes one value outside ends the process. Between rows that do not follow each other there are values
that are not numbers: what a kernel reads of them spreads, and what it writes to them is noticed.
"""

import ctypes
import mmap
from collections import Counter

import torch
from torch import Tensor

from modeling_fambav import numba_channels, numba_jobs, rms_norm_numba, token_fusion_numba

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE
_NO_INDEX = -(2**60)
_libc = ctypes.CDLL(None, use_errno=True)
_launch = numba_jobs.launch
launches: Counter[str] = Counter()


class Guarded:
    """A copy of a tensor `(rows, columns)` that touches a page nobody may touch, at its end or at its beginning."""

    def __init__(self, tensor: Tensor, at_end: bool):
        num_rows, num_columns = tensor.shape
        row_stride = tensor.stride(0) if num_rows > 1 else num_columns
        num_values = (num_rows - 1) * row_stride + num_columns
        num_bytes = num_values * tensor.itemsize
        inside = -(-num_bytes // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, inside + 2 * _PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for guard in (address, address + _PAGE + inside):
            if _libc.mprotect(ctypes.c_void_p(guard), _PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = _PAGE + (inside - num_bytes if at_end else 0)
        self._values = torch.frombuffer(self._memory, dtype=tensor.dtype, count=num_values, offset=offset)
        self._values.fill_(torch.nan if tensor.is_floating_point() else _NO_INDEX)
        self.tensor = self._values.as_strided((num_rows, num_columns), (row_stride, 1))
        self.tensor.copy_(tensor.detach())
        self._is_between = torch.ones(num_values, dtype=torch.bool)
        self._is_between.as_strided(self.tensor.shape, self.tensor.stride()).fill_(False)

    def check(self, name: str) -> None:
        between = self._values[self._is_between]
        is_untouched = between.isnan() if between.is_floating_point() else between == _NO_INDEX
        assert is_untouched.all(), f"{name}: written between its rows"


def _run(kernel, num_tasks, sizes, operands, at_end: bool) -> list[Guarded | None]:
    present = [operand.tensor is not None and operand.tensor.numel() > 0 for operand in operands]
    guarded = [Guarded(operand.tensor, at_end) if is_there else None for operand, is_there in zip(operands, present)]
    inside = [
        operand if place is None else operand._replace(tensor=place.tensor)
        for operand, place in zip(operands, guarded)
    ]
    _launch(kernel, num_tasks, sizes, inside)
    for operand, place in zip(operands, guarded):
        if place is not None:
            place.check(f"{operand.name} of {kernel.__name__}")
    return guarded


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(other.detach().contiguous().view(torch.uint8))


def launch(kernel, num_tasks, sizes, operands) -> None:
    """As that of `numba_jobs`."""
    function = kernel._pyfunc
    launches[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] += 1
    first, second = (_run(kernel, num_tasks, sizes, operands, at_end) for at_end in (True, False))
    for operand, one, other in zip(operands, first, second):
        if one is not None:
            assert _has_same_bits(one.tensor, other.tensor), (
                f"{operand.name} of {kernel.__name__}: depends on its place"
            )
            if not _has_same_bits(one.tensor, operand.tensor):  # inputs are left alone, as a kernel leaves them
                operand.tensor.copy_(one.tensor)


def pytest_configure() -> None:
    for module in (numba_channels, rms_norm_numba, token_fusion_numba):
        module.launch = launch


def pytest_terminal_summary(terminalreporter) -> None:
    for name, number in sorted(launches.items()):
        terminalreporter.write_line(f"guarded {name} {number}")
