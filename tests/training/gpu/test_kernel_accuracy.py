"""The comparison with float64 finds wrong kernels, and covers every operator."""

import pytest
import torch

from fambav_training.gpu import backends, kernel_accuracy
from fambav_training.gpu.plan import full_plan, rehearsal


def test_every_operator_on_every_backend_of_this_machine(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends._OF_DEVICE, "cpu", ("numba", "triton"))
    names = [cell.name for cell in kernel_accuracy.cells(rehearsal())]
    for backend in ("numba", "triton"):
        assert {name.split(", ")[0] for name in names if f", {backend}," in name} == set(kernel_accuracy._FUNCTIONS)
    assert len(names) == 2 * 3 * (2 + 2 * 3)
    for cell in kernel_accuracy.cells(rehearsal()):
        if "triton, float32" in cell.name and ("16 states" in cell.name or "states" not in cell.name):
            found = cell.measure()
            assert max(found["errors"].values()) <= found["bound"]
            inputs = kernel_accuracy.inputs_of(cell.name.split(",")[0], (2, 17, 32), 4, torch.float32)
            assert {f"d{name}" for name in inputs} < set(found["errors"])


@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x * torch.nan])
def test_a_wrong_value_or_gradient_is_an_error(monkeypatch, wrong):
    def scan(x, **_):
        return wrong(x) if x.dtype == torch.float32 else x

    monkeypatch.setitem(kernel_accuracy._FUNCTIONS, "scan", scan)
    inputs = {"x": torch.randn(2, 5, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(ValueError, match="is off by .* of its largest value, expected at most 0.0001"):
        kernel_accuracy._errors("torch", scan, inputs, 1e-4)


def test_sizes_on_a_gpu_are_those_of_vim_ti():
    plan = full_plan()
    assert plan.accuracy_shape[1:] == (197, 384) and plan.speed_shapes[0] == (128, 197, 384)
    assert {case.backend for case in plan.suite["Ti geometry, 224 px, batch 128, bf16"]} == {
        None,
        "triton",
        "mamba-ssm",
    }
