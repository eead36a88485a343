"""Models timed beside each other: one that fails leaves the others their numbers."""

import torch

from fambav_training.benchmark.workload import Workload
from fambav_training.gpu import model_speed
from fambav_training.gpu.plan import rehearsal


def test_a_model_that_fails_costs_the_others_nothing(monkeypatch):
    step = Workload.step

    def step_without_deit(workload):
        if workload.case.family == "deit":
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(workload)

    monkeypatch.setattr(Workload, "step", step_without_deit)
    plan = rehearsal()
    (cell,) = model_speed.cells(plan, plan.suite)
    found = cell.measure()
    assert [record["label"] for record in found["records"]] == ["Famba-V-Ti none", "Famba-V-Ti upper", "DeiT-Ti"]
    assert all(record["step_seconds"] > 0 for record in found["records"][:2])
    assert found["error"] == f"DeiT-Ti: {found['records'][2]['error']}"
    assert "OutOfMemoryError at test_model_speed.py" in found["error"]
