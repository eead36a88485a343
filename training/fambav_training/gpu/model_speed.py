"""Whole models: no fusion, every strategy and DeiT, forward and training step, and their memory."""

from collections.abc import Iterator
from typing import Any

import torch

from fambav_training.benchmark.cases import Case
from fambav_training.benchmark.measurement import measure
from fambav_training.gpu.backends import on_backend, problem_of
from fambav_training.gpu.plan import Plan
from fambav_training.gpu.steps import Cell


def cells(plan: Plan, suite: dict[str, list[Case]]) -> Iterator[Cell]:
    """A cell per table of a suite, in which all its models take turns. Memory is measured on a GPU only."""
    device = torch.device(plan.device)
    for title, cases in suite.items():

        def measure_table(cases: list[Case] = cases) -> dict[str, Any]:
            backends = {case.backend for case in cases if case.backend is not None}
            problems = {name: problem for name in sorted(backends) if (problem := problem_of(name)) is not None}
            usable = [case for case in cases if case.backend not in problems]
            with on_backend(None):
                records = measure(usable, device, plan.rounds, train=True, with_memory=device.type == "cuda")
            return {"records": records, "not_usable": problems}

        yield Cell(title, measure_table)
