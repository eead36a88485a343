"""Jobs: how a CPU kernel gets its tensors, its tasks and its threads.

A job is an array of int64 that all threads read: [next task, number of tasks, five sizes, then address, row distance
and bytes per value of every tensor]; an absent tensor has address 0. A kernel is a C function of the address of a job,
so any thread may run it without a Python thread state. It takes tasks until none is left:

    @kernel
    def name(address):
        job = open_job(address, num_tensors)
        weight, result = rows(job, 0), rows_of_any(job, 1)
        while True:
            task = next_task(job)
            if task < 0:
                break
            ...
"""

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .numba_vectors import carray, cfunc, fetch_add, intrinsic, njit, types

_NUM_TASKS, _SIZES, _TENSORS = 1, 2, 7  # where these begin in a job

inlined = njit(inline="always", error_model="numpy")


_SHARED_SOURCES = ("numba_vectors.py", "numba_jobs.py", "numba_channels.py", "selective_scan.py")


def _digest_of_sources() -> str:
    """Of the files, beside its own, that a kernel has functions and constants from."""
    digest = hashlib.sha256()
    for name in _SHARED_SOURCES:
        try:
            digest.update(__loader__.get_data(str(Path(__file__).with_name(name))))  # which may be in a zip file
        except OSError:
            pass  # there are only compiled files, of which none changes without the others
    return digest.hexdigest()[:8]


_SOURCES = _digest_of_sources()


def kernel(function):
    """Compile a kernel, and keep it on disk for the next process.

    numba compiles it again when the file of the kernel has changed, but does not look at the files that this one
    imports. Their digest becomes part of the name of the file on disk: an upgrade must not run code of before.
    """
    function.__qualname__ += f"_{_SOURCES}"
    return cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")(function)


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
def rows_of_any(job, index):
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


def launch(kernel, num_tasks: int, sizes: tuple[int, ...], tensors: list[Tensor | None]) -> None:
    """Run a kernel on `torch.get_num_threads()` threads, this one included.

    Args:
        kernel: made by `@kernel`.
        num_tasks: tasks to hand out.
        sizes: at most five numbers.
        tensors: float32, bfloat16 or int64, of two dimensions, the last one contiguous; None where one is absent.
    """
    global _pool
    job = [0, num_tasks, *sizes, *[0] * (5 - len(sizes))]
    for tensor in tensors:
        item_bytes = 0 if tensor is None else tensor.element_size()
        job += [0, 0, 0] if tensor is None else [tensor.data_ptr(), tensor.stride(0) * item_bytes, item_bytes]
    job = np.array(job, dtype=np.int64)
    address = job.ctypes.data
    num_threads = min(torch.get_num_threads(), num_tasks)
    if num_threads > 1 and _gomp_parallel is not None:
        _gomp_parallel(kernel.address, address, num_threads, 0)
        return
    # ctypes lets go of the GIL while a function runs
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)
    others = []
    if num_threads > 1:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fambav")
        others = [_pool.submit(function, address) for _ in range(num_threads - 1)]
    function(address)
    for other in others:
        other.result()
