"""Whole models: no fusion, every strategy and DeiT, forward and training step, and their memory."""

from collections.abc import Iterator
from typing import Any

import torch

from fambav_training.benchmark.cases import Case
from fambav_training.benchmark.measurement import measure
from fambav_training.gpu.backends import is_installed, on_backend, problem_of
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell, error_text


def cells(plan: Plan, suite: dict[str, list[Case]]) -> Iterator[Cell]:
    """A cell per table of a suite, in which all its models take turns. Memory is measured on a GPU only."""
    device = torch.device(plan.device)
    for title, cases in suite.items():

        def measure_table(cases: list[Case] = cases) -> dict[str, Any]:
            return _records(cases, device, plan)

        yield Cell(title, measure_table)


def _records(cases: list[Case], device: torch.device, plan: Plan) -> dict[str, Any]:
    """What is measured of each model.

    One that fails has its label and an `error` instead, and so has the whole; backends that are not installed are
    named.
    """
    backends = sorted({case.backend for case in cases if case.backend is not None})
    missing = {backend: problem_of(backend) for backend in backends if not is_installed(backend)}
    errors: dict[str, str] = {}

    def note(case: Case, error: Exception) -> None:
        errors[case.label] = error_text(error)

    usable = [case for case in cases if case.backend not in missing]
    with_memory = device.type == "cuda"
    with on_backend(None):
        records = measure(usable, device, plan.rounds, True, with_memory, plan.seconds, note)
    failed = [{"label": label, "error": error} for label, error in errors.items()]
    found: dict[str, Any] = {"records": [*records, *failed], "not_usable": missing}
    if errors:
        found["error"] = "; ".join(f"{label}: {error}" for label, error in errors.items())
    return found
