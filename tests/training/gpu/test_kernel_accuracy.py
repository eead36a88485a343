"""The comparison with float64 finds wrong kernels, and covers every operator."""

import sys

import pytest
import torch

from fambav_training.gpu import backends, kernel_accuracy
from fambav_training.gpu.plan import full_plan, rehearsal
from modeling_fambav.backends import _Problem, _problems


def test_every_operator_on_every_backend_of_this_machine(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(backends._OF_DEVICE, "cpu", ("numba", "triton"))
    cells = list(kernel_accuracy.cells(rehearsal()))
    names = [cell.name for cell in cells if ", " in cell.name]
    assert [cell.name for cell in cells[:2]] == ["numba", "triton"]
    assert all(cell.measure() == {"not_usable": None} for cell in cells[:2])
    for backend in ("numba", "triton"):
        assert {name.split(", ")[0] for name in names if f", {backend}," in name} == set(kernel_accuracy._FUNCTIONS)
    assert len(names) == 2 * 3 * (2 + 2 * 3)
    for cell in cells:
        if "triton, float32" in cell.name and ("16 states" in cell.name or "states" not in cell.name):
            found = cell.measure()
            assert max(found["errors"].values()) <= found["bound"]
            inputs = kernel_accuracy.inputs_of(cell.name.split(",")[0], (2, 17, 32), 4, torch.float32)
            assert {f"d{name}" for name in inputs} < set(found["errors"])


def test_a_broken_backend_is_a_failure_and_a_missing_one_is_not(monkeypatch):
    problem = _Problem("numba fails with OSError: no such library", "mend it", False, OSError("no such library"))
    monkeypatch.setitem(_problems, "numba", problem)
    cells = list(kernel_accuracy.cells(rehearsal()))
    assert cells[0].name == "numba" and all(", torch, " in cell.name for cell in cells[1:])
    with pytest.raises(ImportError, match="numba fails with OSError: no such library"):
        cells[0].measure()
    missing = _Problem("numba is not installed", "`pip install numba`", True, None)
    monkeypatch.setitem(_problems, "numba", missing)
    monkeypatch.setitem(sys.modules, "numba", None)
    found = next(iter(kernel_accuracy.cells(rehearsal()))).measure()
    assert found == {"not_usable": "scan backend 'numba': numba is not installed; `pip install numba`"}


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
