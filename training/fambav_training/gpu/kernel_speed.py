"""The scan and the whole mixer on every backend beside each other, forward and with gradients."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fambav_training.gpu.backends import backends_of, is_installed, on_backend, problem_of
from fambav_training.gpu.kernel_accuracy import inputs_of
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell, error_text
from modeling_fambav.bidirectional_scan import bidirectional_scan
from modeling_fambav.selective_scan import selective_scan

_FUNCTIONS = {"scan": selective_scan, "mixer": bidirectional_scan}
_STATE_SIZE = 16


def cells(plan: Plan) -> Iterator[Cell]:
    """A cell per operator and shape, in bfloat16, in which all backends take turns."""
    for shape in plan.speed_shapes:
        for operator in _FUNCTIONS:

            def measure(operator: str = operator, shape: tuple[int, int, int] = shape) -> dict[str, Any]:
                return _times(operator, shape, plan)

            yield Cell(f"{operator}, {shape[0]} x {shape[1]} tokens, {shape[2]} channels", measure)


def _times(operator: str, shape: tuple[int, int, int], plan: Plan) -> dict[str, Any]:
    """Milliseconds of each backend, forward and forward with backward.

    One that fails has an `error` instead, and so has the whole; those that are not installed are named.
    """
    device = torch.device(plan.device)
    inputs = inputs_of(operator, shape, _STATE_SIZE, torch.bfloat16)
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}
    backends = (*backends_of(device), "torch")
    missing = {backend: problem_of(backend) for backend in backends if not is_installed(backend)}
    errors: dict[str, str] = {}
    milliseconds: dict[str, dict[str, list[float]]] = {backend: {} for backend in backends if backend not in missing}
    for round_number in range(plan.rounds + 1):
        for backend, of_backend in milliseconds.items():
            if backend in errors:
                continue
            try:
                with on_backend(backend):
                    for kind, call in _calls(_FUNCTIONS[operator], inputs).items():
                        value = 1e3 * _seconds(call, device, plan.seconds)
                        if round_number > 0:  # the first one warms up
                            of_backend.setdefault(f"{kind}_ms", []).append(value)
            except Exception as error:
                errors[backend] = error_text(error)
    found: dict[str, Any] = {
        backend: {"error": errors[backend]}
        if backend in errors
        else {kind: statistics.median(values) for kind, values in of_backend.items()}
        for backend, of_backend in milliseconds.items()
    }
    found["not_usable"] = missing
    if errors:
        found["error"] = "; ".join(f"{backend}: {error}" for backend, error in errors.items())
    return found


def _calls(function: Callable, inputs: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    leaves = list(inputs.values())

    @torch.no_grad()
    def forward() -> None:
        function(**inputs)

    def with_backward() -> None:
        out = function(**inputs)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {"forward": forward, "forward_backward": with_backward}


def _seconds(call: Callable[[], None], device: torch.device, min_seconds: float) -> float:
    """Mean of as many calls as fill this time; on a GPU they are queued in groups, so that launches overlap."""
    calls, group, started = 0, 1, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < min_seconds:
        for _ in range(group):
            call()
        calls += group
        if device.type == "cuda":
            torch.cuda.synchronize()
            group = 10
    return (time.perf_counter() - started) / calls
