"""The scan and the whole mixer on every backend beside each other, forward and with gradients."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fambav_training.gpu.backends import on_backend, problem_of
from fambav_training.gpu.kernel_accuracy import inputs_of
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell
from modeling_fambav.bidirectional_scan import bidirectional_scan
from modeling_fambav.selective_scan import selective_scan

_FUNCTIONS = {"scan": selective_scan, "mixer": bidirectional_scan}
_BACKENDS = {"cuda": ("triton", "mamba-ssm", "torch"), "cpu": ("numba", "torch")}
_STATE_SIZE = 16


def cells(plan: Plan) -> Iterator[Cell]:
    """A cell per operator and shape, in bfloat16, in which all backends take turns."""
    for shape in plan.speed_shapes:
        for operator in _FUNCTIONS:

            def measure(operator: str = operator, shape: tuple[int, int, int] = shape) -> dict[str, Any]:
                return _times(operator, shape, plan)

            yield Cell(f"{operator}, {shape[0]} x {shape[1]} tokens, {shape[2]} channels", measure)


def _times(operator: str, shape: tuple[int, int, int], plan: Plan) -> dict[str, Any]:
    """Milliseconds of each backend, forward and forward with backward; why of those that cannot be used."""
    device = torch.device(plan.device)
    inputs = inputs_of(operator, shape, _STATE_SIZE, torch.bfloat16)
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}
    problems = {backend: problem_of(backend) for backend in _BACKENDS[device.type]}
    usable = [backend for backend, problem in problems.items() if problem is None]
    milliseconds: dict[tuple[str, str], list[float]] = {}
    for round_number in range(plan.rounds + 1):
        for backend in usable:
            with on_backend(backend):
                for kind, call in _calls(_FUNCTIONS[operator], inputs).items():
                    value = 1e3 * _seconds(call, device, plan.seconds)
                    if round_number > 0:  # the first one warms up
                        milliseconds.setdefault((backend, kind), []).append(value)
    found: dict[str, Any] = {backend: {} for backend in usable}
    for (backend, kind), values in milliseconds.items():
        found[backend][f"{kind}_ms"] = statistics.median(values)
    return {**found, "not_usable": {backend: problem for backend, problem in problems.items() if problem is not None}}


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
