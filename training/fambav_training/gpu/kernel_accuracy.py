"""Kernels against float64: every operator, its values and all its gradients, over data types and state sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fambav_training.gpu.backends import backends_of, is_installed, on_backend, problem_of
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell
from modeling_fambav.bidirectional_scan import bidirectional_scan
from modeling_fambav.causal_conv1d import causal_conv1d
from modeling_fambav.selective_scan import selective_scan
from modeling_fambav.token_fusion import fuse

# Largest error of a result, as a share of its largest value
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_STATE_SIZES = (16, 4, 64)
_RANK, _TAPS = 12, 4


def cells(plan: Plan) -> Iterator[Cell]:
    """A cell per backend, operator, data type and, for scans, state size; before them one that loads the backend."""
    device = torch.device(plan.device)
    for backend in backends_of(device):
        yield Cell(backend, lambda backend=backend: _loaded(backend))
    usable = [backend for backend in backends_of(device) if problem_of(backend) is None]
    for backend in usable or ["torch"]:
        for operator in _FUNCTIONS:
            if backend == "mamba-ssm" and operator not in ("scan", "mixer"):
                continue  # plain torch there
            for dtype in BOUNDS:
                for state_size in _STATE_SIZES if operator in ("scan", "mixer") else (None,):
                    name = f"{operator}, {backend}, {dtype}" + (f", {state_size} states" if state_size else "")

                    def measure(
                        backend: str = backend,
                        operator: str = operator,
                        dtype: str = dtype,
                        state_size: int | None = state_size,
                    ) -> dict[str, Any]:
                        inputs = inputs_of(operator, plan.accuracy_shape, state_size or 0, getattr(torch, dtype))
                        inputs = {key: value.to(device) for key, value in inputs.items()}
                        return _errors(backend, _FUNCTIONS[operator], inputs, BOUNDS[dtype])

                    yield Cell(name, measure)


def _loaded(backend: str) -> dict[str, Any]:
    """Load a backend, or say that it is not installed.

    Raises:
        ImportError: if it is installed, but broken.
    """
    if not is_installed(backend):
        return {"not_usable": problem_of(backend)}
    with on_backend(backend):
        return {"not_usable": None}


def _errors(backend: str, function: Callable, inputs: dict[str, Tensor], bound: float) -> dict[str, Any]:
    """The largest error of every output and gradient, as a share of its largest value.

    Raises:
        ValueError: if one is above the bound, or no number.
    """
    with on_backend("torch"):
        expected = _results(function, {name: tensor.double() for name, tensor in inputs.items()})
    with on_backend(backend):
        actual = _results(function, inputs)
    errors = {}
    for name, tensor in actual.items():
        difference = (tensor.double() - expected[name]).abs().max().item()
        errors[name] = difference / max(expected[name].abs().max().item(), 1e-30)
    is_within = all(error <= bound for error in errors.values())  # a NaN is not
    if not is_within:
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        raise ValueError(f"{worst} is off by {errors[worst]:.3g} of its largest value, expected at most {bound}")
    return {"errors": errors, "bound": bound}


def _results(function: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs for fixed gradients of the outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([(out.double() * _random(*out.shape, seed=99).to(out.device)).sum() for out in outputs]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
    return {**{f"output {i}": out.detach() for i, out in enumerate(outputs)}, **named}


def _fused(metric: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Both merged; a token with another partner would be an error of the size of the values."""
    merged, merged_stream, _ = fuse(metric, stream, metric.shape[1] // 5)
    return merged, merged_stream


_FUNCTIONS = {"fusion": _fused, "convolution": causal_conv1d, "scan": selective_scan, "mixer": bidirectional_scan}


def inputs_of(operator: str, shape: tuple[int, int, int], state_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of "fusion", "convolution", "scan" or "mixer" for (batch, tokens, channels), on the CPU."""
    return _INPUTS[operator](shape, state_size, dtype)


# ---- inputs: time steps and decays as a layer starts with; parameters of the scan in float32 ----


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _of_recurrence(channels: int, state_size: int) -> dict[str, Tensor]:
    A = torch.arange(1, state_size + 1, dtype=torch.float32).expand(2, channels, -1)
    return {
        "dt_bias": (0.5 * _random(2, channels, seed=1) - 3).float(),
        "A": -A * (1 + 0.1 * _random(2, channels, state_size, seed=2).abs()).float(),
        "D": _random(2, channels, seed=3).float(),
    }


def _scan_inputs(shape: tuple[int, int, int], state_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    batch_size, num_tokens, channels = shape
    per_token = (2, batch_size, num_tokens)
    return {
        "x": _random(*per_token, channels, seed=4, dtype=dtype),
        "dt": _random(*per_token, channels, seed=5, dtype=dtype),
        "B": _random(*per_token, state_size, seed=6, dtype=dtype),
        "C": _random(*per_token, state_size, seed=7, dtype=dtype),
        "z": _random(batch_size, num_tokens, channels, seed=8, dtype=dtype),
        **_of_recurrence(channels, state_size),
    }


def _mixer_inputs(shape: tuple[int, int, int], state_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    batch_size, num_tokens, channels = shape
    return {
        "xz": _random(batch_size, num_tokens, 2 * channels, seed=4, dtype=dtype),
        "conv_weight": (0.5 * _random(2, channels, _TAPS, seed=5)).to(dtype),
        "conv_bias": (0.1 * _random(2, channels, seed=6)).to(dtype),
        "x_proj": (_random(2, _RANK + 2 * state_size, channels, seed=7) / channels**0.5).to(dtype),
        "dt_proj": (_random(2, channels, _RANK, seed=8) / _RANK**0.5).to(dtype),
        **_of_recurrence(channels, state_size),
    }


def _conv_inputs(shape: tuple[int, int, int], state_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    channels = shape[2]
    weight, bias = _random(2, channels, _TAPS, seed=5).float(), _random(2, channels, seed=6).float()
    return {"x": _random(*shape, seed=4, dtype=dtype), "weight": weight, "bias": bias}


def _fusion_inputs(shape: tuple[int, int, int], state_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"metric": _random(*shape, seed=4, dtype=dtype), "stream": _random(*shape, seed=5).float()}


_INPUTS = {
    "fusion": _fusion_inputs,
    "convolution": _conv_inputs,
    "scan": _scan_inputs,
    "mixer": _mixer_inputs,
}
