"""Jobs: how a CPU kernel gets its tensors, its tasks and its threads.

A job is an array of int64 that all threads read: [next task, number of tasks, five sizes, then address, row distance
and bytes per value of every tensor]; an absent tensor has address 0. A kernel is a C function of the address of a job,
so any thread may run it without a Python thread state. It takes tasks until none is left:

    @kernel
    def name(address):
        job = open_job(address, num_tensors)
        weight, result = rows(job, 0), float_rows(job, 1)
        while True:
            task = next_task(job)
            if task < 0:
                break
            ...
"""

import ctypes
import functools
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .numba_vectors import carray, cfunc, fetch_add, intrinsic, njit, types
from .operators import digest_of
from .workspace import temporary

logger = logging.get_logger(__name__)

_NUM_TASKS, _SIZES, _TENSORS = 1, 2, 7  # where these begin in a job

inlined = njit(inline="always", error_model="numpy")


# Files, beside its own, that a kernel has functions and constants from
_SHARED_SOURCES = ("numba_vectors", "numba_functions", "numba_jobs", "numba_channels", "numba_scan_loops", "backends")
_SUFFIX = digest_of(_SHARED_SOURCES)
_SIGNATURE = types.void(types.CPointer(types.int64))


def kernel(function):
    """Compile a kernel, and keep it on disk for the next process.

    numba compiles it again when the file of the kernel has changed, but does not look at the files that this one
    imports. Their digest becomes part of the name of the file on disk: an upgrade must not run code of before.
    """
    function.__qualname__ += f"_{_SUFFIX}"
    try:
        compiled = cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)
    except Exception as error:  # a folder that is read-only, full, or holds damaged files; or the compiler
        compiled = cfunc(_SIGNATURE, error_model="numpy")(function)  # which then fails again
        _warn_that_nothing_is_kept(error)
    else:
        if compiled.cache_hits == 0:
            _say_why_the_first_time_is_slow(compiled._cache.cache_path)
    return compiled


_has_warned = _has_said_why = False


def _say_why_the_first_time_is_slow(folder: str) -> None:
    """After the first kernel that was not on disk, before the others."""
    global _has_said_why
    if not (_has_said_why or _has_warned):
        logger.warning(
            "Famba-V compiles its CPU kernels for this machine, which takes about twenty seconds, once: the next "
            f"process finds them in {folder}."
        )
    _has_said_why = True


def _warn_that_nothing_is_kept(error: Exception) -> None:
    global _has_warned
    if not _has_warned:
        logger.warning(
            "Famba-V's compiled CPU kernels cannot be kept on disk "
            f"({type(error).__name__}: {' '.join(str(error).split())}), so every process compiles them again. "
            "Set NUMBA_CACHE_DIR to a folder that can be written to, or empty the one that is there."
        )
    _has_warned = True


# ---- inside kernels ----


@inlined
def open_job(address, num_tensors):
    """The job at an address."""
    return carray(address, (_TENSORS + 3 * num_tensors,), np.int64)


@inlined
def sizes(job):
    """The five sizes of a job."""
    return job[_SIZES], job[_SIZES + 1], job[_SIZES + 2], job[_SIZES + 3], job[_SIZES + 4]


@inlined
def rows(job, index):
    """Rows of a float32 or int64 tensor; their address is 0 if it is absent."""
    return job[_TENSORS + 3 * index], job[_TENSORS + 3 * index + 1], types.int64(4)


@inlined
def float_rows(job, index):
    """Rows of a float32 or bfloat16 tensor, whose values are to be read and written as vectors."""
    return job[_TENSORS + 3 * index], job[_TENSORS + 3 * index + 1], job[_TENSORS + 3 * index + 2]


@inlined
def scratch(array):
    """Rows of a C-contiguous float32 array, which is to be kept by `keep` until they are no longer used."""
    return types.int64(array.ctypes.data), types.int64(array.shape[1] * 4), types.int64(4)


@intrinsic
def keep(typing_context, arrays):
    """Do nothing, behind the last use of scratch rows: numba frees an array after the last line that names it."""

    def generate(context, builder, signature, args):
        return context.get_dummy_value()

    return types.void(arrays), generate


@inlined
def next_task(job):
    """A task that no other thread has, or -1 if none is left."""
    task = fetch_add((types.int64(job.ctypes.data), types.int64(0), types.int64(0)))
    return task if task < job[_NUM_TASKS] else types.int64(-1)


# ---- tensors ----


class Operand(NamedTuple):
    """A tensor, and what a kernel, which sees nothing but its address, takes it for.

    Attributes:
        name (`str`): for messages.
        tensor (`Tensor` of shape `(num_rows, num_columns)`, *optional*): on the CPU, the last dimension contiguous;
            None if it is absent.
        num_rows, num_columns (`int`): what the kernel reads and writes.
        dtypes (`tuple[torch.dtype, ...]`): those that the kernel knows there.
    """

    name: str
    tensor: Tensor | None
    num_rows: int
    num_columns: int
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


def buffer(name: str, num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32, fill=None) -> Operand:
    """A tensor for a kernel to write to, whatever torch's default dtype and device are: new, or a `temporary` one."""
    shape = (num_rows, num_columns)
    tensor = temporary(shape, dtype, "cpu") if fill is None else torch.full(shape, fill, dtype=dtype, device="cpu")
    return Operand(name, tensor, num_rows, num_columns, (dtype,))


def _address(kernel, operand: Operand) -> tuple[int, int, int]:
    """Address, bytes from row to row, and bytes per value, of what has been checked."""
    name, tensor, num_rows, num_columns, dtypes = operand
    if tensor is None:
        return 0, 0, 0
    if not tensor.is_cpu or tensor.dtype not in dtypes or tensor.shape != (num_rows, num_columns):
        raise ValueError(
            f"{name} of the kernel {kernel.__name__} is {tensor.dtype} of shape {tuple(tensor.shape)} on "
            f"{tensor.device}: expected {' or '.join(map(str, dtypes))} of shape {(num_rows, num_columns)} on cpu"
        )
    row_stride, column_stride = tensor.stride()
    if num_columns > 1 and column_stride != 1:
        raise ValueError(f"{name} of the kernel {kernel.__name__} has strides {tensor.stride()}: expected (any, 1)")
    item_bytes = tensor.itemsize
    return tensor.data_ptr(), row_stride * item_bytes, item_bytes


# ---- threads ----


def _find_gomp():
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP that torch runs on, or None.

    Torch's threads spin for a while after each operation, so kernels on other threads would have to share the cores
    with them."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no handle of all that is loaded
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_gomp_parallel = _find_gomp()
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    """A forked process has none of its parent's threads, and OpenMP does not notice."""
    global _gomp_parallel, _pool
    _gomp_parallel = _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _c_function(kernel):
    """A kernel as a function of the address of a job; ctypes lets go of the GIL while it runs."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)


def launch(kernel, num_tasks: int, sizes: tuple[int, ...], operands: list[Operand]) -> None:
    """Run a kernel on `torch.get_num_threads()` threads, this one included.

    Args:
        kernel: made by `@kernel`.
        num_tasks: tasks to hand out.
        sizes: at most five numbers.
        operands: the kernel's tensors, in its order.

    Raises:
        ValueError: if a tensor is not what the kernel takes it for; no memory has been touched.
    """
    global _pool
    job = [0, num_tasks, *sizes, *[0] * (5 - len(sizes))]
    for operand in operands:
        job += _address(kernel, operand)
    job = array("q", job)
    address, _ = job.buffer_info()
    num_threads = min(torch.get_num_threads(), num_tasks)
    if num_threads > 1 and _gomp_parallel is not None:
        _gomp_parallel(kernel.address, address, num_threads, 0)
        return
    function = _c_function(kernel)
    others = []
    if num_threads > 1:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fambav")
        others = [_pool.submit(function, address) for _ in range(num_threads - 1)]
    function(address)
    for other in others:
        other.result()
