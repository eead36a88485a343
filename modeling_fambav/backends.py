"""Backends: which ones there are, what they serve, which one computes, and why another one does not.

A backend is a way to run the operators of this package: the scan and the convolution on all of them, fusion on "numba"
and "triton", the norm on "numba". The files of the operators bring their kernels (`provides`), this file knows nothing
about them. A backend is used if everything that it provides can be imported and compiled, which is tried once, at the
first use of a model, and not when the package is imported.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


class _Backend(NamedTuple):
    module: str  # that it needs
    package: str  # that provides the module
    devices: tuple[str, ...] | None  # that it serves; None is all


# By device, the first one that works is chosen.
_BACKENDS = {
    "numba": _Backend("numba", "numba", ("cpu",)),
    "triton": _Backend("triton", "triton", ("cuda",)),
    "mamba-ssm": _Backend("mamba_ssm", "mamba-ssm", ("cuda",)),
    "torch": _Backend("torch", "torch", None),
}
# Backends with kernels of ours for the whole mixer; the others are functions of their own.
HAS_KERNELS = ("numba", "triton")
# Steps between the states that the forward pass keeps for the backward pass. The states that the latter computes again
# fit the second-level cache: on a CPU those of one chunk (0.6 MB for 16 states), on a GPU those of all programs that
# run at a time (33 MiB on an H100). Triton takes steps in pairs, so its number is even; a CPU's is a few more than 64,
# so that the class token beside 64 or 196 patches has no chunk to itself.
CHUNK_STEPS = {"numba": 72, "triton": 32}
# The first chunk whose states are kept: those of chunk 0 are zeros, which Triton's kernels read like all others.
_FIRST_KEPT_CHUNK = {"numba": 1, "triton": 0}
# Kept states have at least as many channels: one block of a CPU kernel, see `pad_channels`.
_FEWEST_CHANNELS = {"numba": 64, "triton": 1}

_chosen: str | None = os.environ.get("FAMBAV_SCAN_BACKEND") or None
_providers: dict[str, list[Callable]] = {name: [] for name in _BACKENDS}
# What has been tried: why a backend cannot be used, and the backend of a device
_problems: dict[str, "_Problem | None"] = {}
_choices: dict[str, str] = {}
_lock = threading.RLock()


class _Problem(NamedTuple):
    """Why a backend cannot be used."""

    reason: str
    remedy: str
    is_missing: bool  # rather than broken
    error: Exception | None


def states_shape(backend: str, x: Tensor, A: Tensor, keep_states: bool) -> tuple[int, int]:
    """Shape of the states that the scan of a backend keeps, (G * B * kept chunks * N, channels); no row if none are.

    Known without the kernels: a model can be traced where numba cannot be imported.
    """
    num_directions, batch_size, num_tokens, channels = x.shape
    num_chunks = -(-num_tokens // CHUNK_STEPS[backend]) - _FIRST_KEPT_CHUNK[backend] if keep_states else 0
    return num_directions * batch_size * num_chunks * A.shape[-1], max(channels, _FEWEST_CHANNELS[backend])


def provides(backend: str) -> Callable[[Callable], Callable]:
    """Decorate a function that imports and returns kernels of a backend; it runs once, at the first use of a model."""

    def register(load: Callable) -> Callable:
        load = functools.cache(load)
        _providers[backend].append(load)
        return load

    return register


def selective_scan_backend(tensor: Tensor) -> str:
    """Name of the backend that scans a tensor like this one: `"numba"`, `"mamba-ssm"`, `"triton"` or `"torch"`.

    Warns, once, of a backend that would be faster but cannot be used.

    Raises:
        ValueError: if the backend that was asked for does not exist or does not serve the tensor's device.
        ImportError: if it is not installed or does not work.
    """
    device = tensor.device.type
    if _chosen is not None:
        _check_backend(_chosen)
        devices = _BACKENDS[_chosen].devices
        # Triton's interpreter runs its kernels on the CPU, for tests
        is_interpreted = _chosen == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if devices is not None and device not in devices and not is_interpreted:
            raise ValueError(f"scan backend {_chosen!r}: expected a tensor on one of {devices}, got {device!r}")
        return _chosen
    if tensor.dtype == torch.float64:
        return "torch"  # the kernels compute in float32
    return _choice(device)


def uses_cpu_kernels(tensor: Tensor) -> bool:
    """Whether compiled CPU kernels serve a tensor like this one."""
    return tensor.device.type == "cpu" and selective_scan_backend(tensor) == "numba"


def set_selective_scan_backend(name: str | None) -> str | None:
    """Use this backend from now on: `"numba"`, `"mamba-ssm"`, `"triton"`, `"torch"`, or None to choose by device.

    Returns:
        what it was before.

    Raises:
        ValueError: if there is no such backend.
        ImportError: if it is not installed or does not work.
    """
    global _chosen
    if name is not None:
        _check_backend(name)
    previous, _chosen = _chosen, name
    return previous


# torch.compile runs the next two functions when it traces, rather than to look into what they import.
@torch.compiler.assume_constant_result
def _check_backend(name: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"scan backend {name!r}: expected one of {sorted(_BACKENDS)}")
    problem = _problem_of(name)
    if problem is not None:
        raise ImportError(f"scan backend {name!r}: {problem.reason}; {problem.remedy}") from problem.error


@torch.compiler.assume_constant_result
def _choice(device: str) -> str:
    """The first backend that serves a device and works."""
    with _lock:
        if device in _choices:
            return _choices[device]
        serving = [name for name, backend in _BACKENDS.items() if backend.devices in (None, (device,))]
        chosen = next(name for name in serving if _problem_of(name) is None)
        if all(name in _problems for name in serving[: serving.index(chosen) + 1]):
            _warn_of_slower_choice(device, chosen, serving[: serving.index(chosen)])
            _choices[device] = chosen
        return chosen


def _warn_of_slower_choice(device: str, chosen: str, passed_over: list[str]) -> None:
    problems = [problem for name in passed_over if (problem := _problem_of(name)) is not None]
    if chosen != "torch":  # one set of kernels is enough, but one that is broken was meant to be used
        problems = [problem for problem in problems if not problem.is_missing]
    if problems:
        reasons = "; ".join(f"{problem.reason}, {problem.remedy}" for problem in problems)
    elif chosen == "torch" and device != "meta":  # where nothing is computed
        reasons = "there are no kernels for it"
    else:
        return
    slow = ", which is slow" if chosen == "torch" else ""
    operations = "plain torch operations" if chosen == "torch" else f"the backend {chosen!r}"
    logger.warning(f"Famba-V computes with {operations} on {device!r}{slow}: {reasons}.")


def _problem_of(name: str) -> _Problem | None:
    """Load everything that a backend provides, the first time; None if all of it works."""
    with _lock:
        if name in _problems:
            return _problems[name]
        if torch.compiler.is_exporting():
            # torch.export replaces functions of `math` while it traces, and numba cannot be imported then.
            return None if importlib.util.find_spec(_BACKENDS[name].module) else _missing(_BACKENDS[name])
        _problems[name] = _load(name)
        return _problems[name]


def _load(name: str) -> _Problem | None:
    backend = _BACKENDS[name]
    try:
        for load in _providers[name]:
            load()
    except ModuleNotFoundError as error:
        if error.name == backend.module:
            return _missing(backend, error)
        return _broken(backend, error)
    except Exception as error:  # what fails in other people's packages and in compilers is of every kind
        return _broken(backend, error)
    return None


def _missing(backend: _Backend, error: Exception | None = None) -> _Problem:
    return _Problem(f"{backend.package} is not installed", f"`pip install {backend.package}`", True, error)


def _broken(backend: _Backend, error: Exception) -> _Problem:
    message = " ".join(str(error).split())
    return _Problem(
        f"{backend.package} is installed but fails with {type(error).__name__}: {message}",
        f"mend or update it (`pip install --upgrade {backend.package}`) or set FAMBAV_SCAN_BACKEND to another backend",
        False,
        error,
    )
