"""A plugin of pytest: every tensor of a CPU kernel lies between two pages of memory that nobody may touch.

    python -m pytest -p support.guarded_memory tests/modeling_fambav/test_rms_norm.py

Each launch runs twice, on copies that end right before such a page and on copies that begin right behind one; a kernel
that reads or writes one value outside ends the process. Between rows that do not follow each other there are values
that are not numbers: what a kernel reads of them spreads, and what it writes to them is noticed. Results begin as such
values too, so those that are never written are noticed.
"""

import ctypes
import mmap
import sys
from collections import Counter

import torch
from torch import Tensor

from modeling_fambav import causal_conv1d_numba, numba_jobs, rms_norm_numba, selective_scan_numba, token_fusion_numba

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE
_NO_INDEX = -(2**60)
_libc = ctypes.CDLL(None, use_errno=True)
_launch, _buffer = numba_jobs.launch, numba_jobs.buffer
_KERNEL_FILES = causal_conv1d_numba, rms_norm_numba, selective_scan_numba, token_fusion_numba
_KERNEL = type(rms_norm_numba._forward)
launches: Counter[str] = Counter()


def _nothing(tensor: Tensor) -> float:
    return torch.nan if tensor.is_floating_point() else _NO_INDEX


def _is_nothing(tensor: Tensor) -> Tensor:
    return tensor.isnan() if tensor.is_floating_point() else tensor == _NO_INDEX


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
        self._values.fill_(_nothing(tensor))
        self.tensor = self._values.as_strided((num_rows, num_columns), (row_stride, 1))
        self.tensor.copy_(tensor.detach())
        self._is_between = torch.ones(num_values, dtype=torch.bool)
        self._is_between.as_strided(self.tensor.shape, self.tensor.stride()).fill_(False)

    def check(self, name: str) -> None:
        assert _is_nothing(self._values[self._is_between]).all(), f"{name}: written between its rows"


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
            place.check(f"{operand.name} of {_name(kernel)}")
    return guarded


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(other.detach().contiguous().view(torch.uint8))


def buffer(name, num_rows, num_columns, dtype=torch.float32, fill=None):
    """As that of `numba_jobs`."""
    operand = _buffer(name, num_rows, num_columns, dtype, fill)
    if fill is None:
        operand.tensor.fill_(_nothing(operand.tensor))
        operand.tensor.is_result = True
    return operand


def launch(kernel, num_tasks, sizes, operands) -> None:
    """As that of `numba_jobs`."""
    launches[_name(kernel)] += 1
    has_numbers = all(
        operand.tensor is None or _is_result(operand) or not _is_nothing(operand.tensor).any() for operand in operands
    )
    first, second = (_run(kernel, num_tasks, sizes, operands, at_end) for at_end in (True, False))
    for operand, one, other in zip(operands, first, second):
        if one is not None:
            what = f"{operand.name} of {_name(kernel)}"
            assert _has_same_bits(one.tensor, other.tensor), f"{what}: depends on its place"
            if has_numbers and _is_result(operand):
                assert not _is_nothing(one.tensor).any(), f"{what}: not all of it is written"
            if not _has_same_bits(one.tensor, operand.tensor):  # inputs are left alone, as a kernel leaves them
                operand.tensor.copy_(one.tensor)


def _is_result(operand) -> bool:
    return getattr(operand.tensor, "is_result", False)


def _name(kernel) -> str:
    function = kernel._pyfunc
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def pytest_configure() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("modeling_fambav."):
            for guarded, original in ((launch, _launch), (buffer, _buffer)):
                if getattr(module, guarded.__name__, None) is original and module is not numba_jobs:
                    setattr(module, guarded.__name__, guarded)


def pytest_terminal_summary(terminalreporter) -> None:
    kernels = {_name(each) for module in _KERNEL_FILES for each in vars(module).values() if isinstance(each, _KERNEL)}
    for name in sorted(kernels):
        terminalreporter.write_line(f"{name}: {launches[name]} launches between guard pages")
