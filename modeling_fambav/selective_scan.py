"""The selective scan of Mamba over several directions at once, and the causal convolution before it (paper eq. 2-3).

Glossary
    G             directions: 1 is a plain causal scan; 2 adds one that runs time backwards (Vim). The backward
                  direction reads and writes its tensors at the positions of the sequence, nobody has to flip them.
    B, T, E       batch, tokens, channels (intermediate size)
    N             state size; h_t, the state of a channel, has N entries and is kept in float32
    K             taps of the convolution
    x  (G,B,T,E)  input, u in Mamba's code
    dt (G,B,T,E)  time step before bias and softplus; delta after them
    A  (G,E,N)    decay, negative
    B, C (G,B,T,N)  input and output projections of the state, chosen by the input
    D  (G,E)      skip connection
    z  (B,T,E)    gate, shared by the directions

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = C_t h_t + D x_t
        out = silu(z) * mean over directions of y

`selective_scan` and `causal_conv1d` are the API. They choose a backend by device and by what is installed, unless
`set_selective_scan_backend` or the environment variable FAMBAV_SCAN_BACKEND names one; `selective_scan_backend` tells
which it is. Backends are files of their own: selective_scan_numba.py (CPU), selective_scan_triton.py and
selective_scan_mamba_ssm.py (CUDA) and selective_scan_torch.py (anywhere); `selective_scan_reference` is what all of
them are tested against.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .selective_scan_torch import conv as torch_conv
from .selective_scan_torch import gated_mean, time_steps
from .selective_scan_torch import scan as torch_scan

logger = logging.get_logger(__name__)


class _Backend(NamedTuple):
    module: str  # that it needs
    package: str  # that provides the module
    devices: tuple[str, ...] | None  # that it serves; None is all


class ScanKernels(NamedTuple):
    """Functions that a backend with kernels of ours provides, see selective_scan_numba.py."""

    scan_forward: Callable
    scan_backward: Callable
    conv_forward: Callable
    conv_backward: Callable


# By device, the first one that is installed is chosen.
_BACKENDS = {
    "numba": _Backend("numba", "numba", ("cpu",)),
    "mamba-ssm": _Backend("mamba_ssm", "mamba-ssm", ("cuda",)),
    "triton": _Backend("triton", "triton", ("cuda",)),
    "torch": _Backend("torch", "torch", None),
}
# Backends with kernels of ours, see `ScanKernels`; the others are functions of their own.
HAS_KERNELS = ("numba", "triton")
# Steps between the states that the forward pass keeps for the backward pass; the states and decays of a chunk fit the
# second-level cache of a CPU, or the registers of a GPU's processors.
CHUNK_STEPS = {"numba": 64, "triton": 32}
# Channels of the kept states come in whole blocks.
VECTOR_CHANNELS = {"numba": 64, "triton": 1}
_INSTALLED = {name: importlib.util.find_spec(backend.module) is not None for name, backend in _BACKENDS.items()}
_chosen: str | None = os.environ.get("FAMBAV_SCAN_BACKEND") or None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_scale: Tensor | None = None,
) -> Tensor:
    """Scan the sequence in every direction and average the gated results.

    Args:
        x (`Tensor` of shape `(G, B, T, E)`): input of each direction, at the positions of the sequence.
        dt (`Tensor` of shape `(G, B, T, E)`): time steps before bias and softplus.
        A (`Tensor` of shape `(G, E, N)`): decay, negative.
        B, C (`Tensor` of shape `(G, B, T, N)`): input and output projections.
        D (`Tensor` of shape `(G, E)`): skip connection.
        z (`Tensor` of shape `(B, T, E)`, *optional*): gate.
        dt_bias (`Tensor` of shape `(G, E)`, *optional*): bias of the time steps.
        dt_scale (`Tensor` of shape `(B, T)`, *optional*):
            Factor of the time steps after the softplus, the size of a fused token. No gradient flows to it.

    Returns:
        `Tensor` of shape `(B, T, E)` in the dtype of `x`.

    Raises:
        ValueError: if a shape does not fit, or there are not one or two directions.
        ImportError: if the backend that was asked for is not installed.
    """
    _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    backend = selective_scan_backend(x)
    if backend in HAS_KERNELS:
        return _fused_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale, torch.is_grad_enabled(), backend)[0]
    if backend == "mamba-ssm":
        from .selective_scan_mamba_ssm import scan as mamba_ssm_scan

        return mamba_ssm_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)
    return torch_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU in every direction; the backward one looks ahead instead of back.

    Args:
        x (`Tensor` of shape `(B, T, E)`): input, shared by the directions.
        weight (`Tensor` of shape `(G, E, K)`): the last tap belongs to the current token.
        bias (`Tensor` of shape `(G, E)`).

    Returns:
        `Tensor` of shape `(G, B, T, E)` in the dtype of `x`.

    Raises:
        ValueError: if a shape does not fit.
        ImportError: if the backend that was asked for is not installed.
    """
    _check_conv(x, weight, bias)
    backend = selective_scan_backend(x)
    if backend in HAS_KERNELS:
        return _fused_conv(x, weight, bias, backend)
    return torch_conv(x, weight, bias)


def selective_scan_backend(tensor: Tensor) -> str:
    """Name of the backend that scans a tensor like this one: `"numba"`, `"mamba-ssm"`, `"triton"` or `"torch"`.

    Raises:
        ValueError: if the backend that was asked for does not exist or does not serve the tensor's device.
        ImportError: if it is not installed.
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
    serving = [name for name, backend in _BACKENDS.items() if backend.devices is None or device in backend.devices]
    installed = next(name for name in serving if _INSTALLED[name])
    if installed == "torch" and not torch.compiler.is_compiling():
        packages = " or ".join(f"`pip install {_BACKENDS[name].package}`" for name in serving if name != "torch")
        remedy = f"{packages} provides kernels" if packages else "there are no kernels for it"
        logger.warning_once(f"Famba-V scans with plain torch operations on {device!r}, which is slow; {remedy}.")
    return installed


def uses_cpu_kernels(tensor: Tensor) -> bool:
    """Whether compiled CPU kernels serve a tensor like this one."""
    return tensor.device.type == "cpu" and selective_scan_backend(tensor) == "numba"


def set_selective_scan_backend(name: str | None) -> str | None:
    """Use this backend from now on: `"numba"`, `"mamba-ssm"`, `"triton"`, `"torch"`, or None to choose by device.

    Returns:
        what it was before.

    Raises:
        ValueError: if there is no such backend.
        ImportError: if it is not installed.
    """
    global _chosen
    if name is not None:
        _check_backend(name)
    previous, _chosen = _chosen, name
    return previous


def _check_backend(name: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"scan backend {name!r}: expected one of {sorted(_BACKENDS)}")
    if not _INSTALLED[name]:
        raise ImportError(f"the scan backend {name} is not installed: `pip install {_BACKENDS[name].package}`")


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations at the head of this file, one token after the other: what every backend is tested against.

    Args: as `selective_scan`.

    Returns:
        the output `(B, T, E)` and the last state of each direction `(G, B, E, N)`.
    """
    delta = time_steps(dt, dt_bias, dt_scale)
    x_, A, B, C, D = (tensor.to(delta.dtype) for tensor in (x, A, B, C, D))
    num_tokens = x.shape[2]
    outputs, last_states = [], []
    for g in range(x.shape[0]):
        h = torch.zeros_like(x_[g, :, 0, :, None] * A[g])  # (B, E, N)
        y = [None] * num_tokens
        for t in range(num_tokens) if g == 0 else reversed(range(num_tokens)):
            decay = torch.exp(delta[g, :, t, :, None] * A[g])
            h = decay * h + (delta[g, :, t] * x_[g, :, t]).unsqueeze(-1) * B[g, :, t, None, :]
            y[t] = (h * C[g, :, t, None, :]).sum(-1) + D[g] * x_[g, :, t]
        outputs.append(torch.stack(y, dim=1))
        last_states.append(h)
    return gated_mean(torch.stack(outputs), z).to(x.dtype), torch.stack(last_states)


def _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_scale) -> None:
    if x.dim() != 4 or not 1 <= x.shape[0] <= 2 or x.shape[2] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (1 or 2 directions, batch, tokens >= 1, channels)")
    num_directions, batch_size, num_tokens, channels = x.shape
    state_size = A.shape[-1]
    _check_shape("dt", dt, tuple(x.shape))
    _check_shape("A", A, (num_directions, channels, state_size))
    _check_shape("B", B, (num_directions, batch_size, num_tokens, state_size))
    _check_shape("C", C, (num_directions, batch_size, num_tokens, state_size))
    _check_shape("D", D, (num_directions, channels))
    _check_shape("z", z, (batch_size, num_tokens, channels))
    _check_shape("dt_bias", dt_bias, (num_directions, channels))
    _check_shape("dt_scale", dt_scale, (batch_size, num_tokens))


def _check_conv(x, weight, bias) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (batch, tokens >= 1, channels)")
    if weight.dim() != 3 or not 1 <= weight.shape[0] <= 2 or weight.shape[1] != x.shape[2] or weight.shape[2] == 0:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: expected (1 or 2 directions, {x.shape[2]} channels, taps >= 1)"
        )
    _check_shape("bias", bias, tuple(weight.shape[:2]))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}")


# ---- kernels as torch operators, for torch.compile, autocast, checkpointing and export ----
# numba and triton are imported inside them: at the first scan, not when a model is imported.


def states_shape(backend: str, x: Tensor, A: Tensor, keep_states: bool) -> tuple[int, int]:
    """Shape of the states that `scan_forward` of a backend keeps, (G * B * chunks * N, channels); no row if none are.

    Known without the kernels: a model can be traced where numba cannot be imported.
    """
    num_directions, batch_size, num_tokens, channels = x.shape
    num_chunks = -(-num_tokens // CHUNK_STEPS[backend]) if keep_states else 0
    lanes = VECTOR_CHANNELS[backend]
    return num_directions * batch_size * num_chunks * A.shape[-1], -(-channels // lanes) * lanes


def kernels_of(backend: str) -> ScanKernels:
    """The kernels of a backend in `HAS_KERNELS`."""
    if backend == "numba":
        from .selective_scan_numba import KERNELS
    else:
        from .selective_scan_triton import KERNELS
    return KERNELS


@torch.library.custom_op("fambav::selective_scan", mutates_args=())
def _fused_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the states that the backward pass starts from (empty unless `keep_states`)."""
    return kernels_of(backend).scan_forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states)


@_fused_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_scale, keep_states, backend):
    return x.new_empty(x.shape[1:]), x.new_empty(states_shape(backend, x, A, keep_states), dtype=torch.float32)


@torch.library.custom_op("fambav::selective_scan_backward", mutates_args=())
def _fused_scan_backward(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D and, if they are given, z and dt_bias."""
    gradients = kernels_of(backend).scan_backward(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states)
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    return [
        gradient.to(tensor.dtype).contiguous() for gradient, tensor in zip(gradients, inputs) if tensor is not None
    ]


@_fused_scan_backward.register_fake
def _(dout, x, dt, A, B, C, D, z, dt_bias, dt_scale, states, backend):
    return [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D, z, dt_bias) if tensor is not None]


def _save_scan(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.backend = inputs[10]


def _backward_of_scan(ctx, dout, _):
    inputs = ctx.saved_tensors
    gradients = iter(_fused_scan_backward(dout, *inputs, ctx.backend))
    differentiable = [next(gradients) if tensor is not None else None for tensor in inputs[:8]]
    return *differentiable, None, None, None


_fused_scan.register_autograd(_backward_of_scan, setup_context=_save_scan)


@torch.library.custom_op("fambav::causal_conv1d", mutates_args=())
def _fused_conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return kernels_of(backend).conv_forward(x, weight, bias)


@_fused_conv.register_fake
def _(x, weight, bias, backend):
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op("fambav::causal_conv1d_backward", mutates_args=())
def _fused_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = kernels_of(backend).conv_backward(dout, x, weight, bias)
    return dx.to(x.dtype), dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype).contiguous()


@_fused_conv_backward.register_fake
def _(dout, x, weight, bias, backend):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))


def _save_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.backend = inputs[3]


def _backward_of_conv(ctx, dout):
    return *_fused_conv_backward(dout, *ctx.saved_tensors, ctx.backend), None


_fused_conv.register_autograd(_backward_of_conv, setup_context=_save_conv)
