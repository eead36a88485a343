"""Backends timed beside each other: one that fails leaves the others their numbers."""

import dataclasses

import pytest

from fambav_training.gpu import kernel_speed
from fambav_training.gpu.plan import rehearsal
from modeling_fambav.backends import selective_scan_backend
from modeling_fambav.selective_scan import selective_scan


@pytest.mark.parametrize("good_calls", [0, 3])
def test_a_backend_that_fails_costs_the_others_nothing(monkeypatch, good_calls):
    calls = []

    def scan(x, **inputs):
        if selective_scan_backend(x) == "numba":
            calls.append(x)
            if len(calls) > good_calls:
                raise RuntimeError("out of memory")
        return selective_scan(x, **inputs)

    monkeypatch.setitem(kernel_speed._FUNCTIONS, "scan", scan)
    plan = dataclasses.replace(rehearsal(), rounds=2)
    scan_cell, mixer_cell = kernel_speed.cells(plan)
    found = scan_cell.measure()
    assert found["error"] == f"numba: {found['numba']['error']}" and len(calls) == good_calls + 1
    assert "RuntimeError at test_kernel_speed.py" in found["error"] and set(found["numba"]) == {"error"}
    assert found["torch"]["forward_ms"] > 0 and found["torch"]["forward_backward_ms"] > 0
    assert "error" not in mixer_cell.measure()
