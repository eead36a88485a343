"""Which backends a device has, and computing on one of them for a while."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_fambav import set_selective_scan_backend

_OF_DEVICE = {"cuda": ("triton", "mamba-ssm"), "cpu": ("numba",)}


def backends_of(device: torch.device) -> tuple[str, ...]:
    """Backends with kernels for this device, whether they are installed or not."""
    return _OF_DEVICE[device.type]


def is_installed(backend: str) -> bool:
    """Whether the package of a backend is there; it may be broken."""
    return importlib.util.find_spec(backend.replace("-", "_")) is not None


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
