"""Which backends a device has, and computing on one of them for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_fambav import set_selective_scan_backend

_OF_DEVICE = {"cuda": ("triton", "mamba-ssm"), "cpu": ("numba",)}


def usable_backends(device: torch.device) -> list[str]:
    """Backends with kernels for this device that can be loaded; plain torch where there are none."""
    usable = [name for name in _OF_DEVICE[device.type] if problem_of(name) is None]
    return usable or ["torch"]


def problem_of(backend: str) -> str | None:
    """Why a backend cannot be used here, None if it can."""
    try:
        with on_backend(backend):
            return None
    except ImportError as error:
        return str(error)


@contextmanager
def on_backend(name: str | None) -> Iterator[None]:
    """Within this context, everything is computed on this backend.

    Raises:
        ImportError: if it is not installed, or broken.
    """
    before = set_selective_scan_backend(name)
    try:
        yield
    finally:
        set_selective_scan_backend(before)
