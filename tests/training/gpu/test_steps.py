"""Cells of a step: measured once, written one by one, tried again if they failed, after all others."""

import json

import pytest

from fambav_training.gpu.steps import Cell, DeviceLostError, Step, read_report, run

CONDITIONS = {"device": "cuda: a GPU", "versions": {"torch": "2.9"}}


class Device:
    """Cells a, b, c and d, e in two steps, whose measurements it notes; those in `failing` raise.

    Those in `deadly` take the device with them: from then on everything fails, until the next process.
    """

    def __init__(self, folder):
        self.folder, self.measured = folder, []
        self.failing, self.deadly = set(), set()
        self.is_lost, self.git_commit = False, "abc"

    def step(self, name: str, cells: str, conditions: dict | None = None) -> Step:
        measures = [Cell(cell, lambda cell=cell: self.measure(cell)) for cell in cells]
        path = self.folder / f"{name}.json"
        return Step(path, measures, read_report(path, conditions or CONDITIONS), self.git_commit)

    def process(self, num_cells: int = 100) -> bool:
        """A process that has time for so many cells."""
        self.is_lost, self.measured = False, []
        steps = [self.step("first", "abc"), self.step("second", "de")]
        return run(steps, lambda: len(self.measured) >= num_cells, self.check)

    def measure(self, cell: str) -> dict:
        self.measured.append(cell)
        self.is_lost |= cell in self.deadly
        if self.is_lost or cell in self.failing:
            raise RuntimeError("out of\nmemory")
        return {"value": cell}

    def check(self) -> None:
        if self.is_lost:
            raise RuntimeError("an illegal memory access was encountered")

    def report(self, name: str = "first") -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path / "out")


def test_a_stop_between_cells_repeats_nothing(device):
    assert not device.process(num_cells=1)
    assert device.measured == ["a"] and not device.report()["is_complete"]
    assert device.process()
    assert device.measured == ["b", "c", "d", "e"]
    cells = {cell: {"git_commit": "abc", "value": cell} for cell in "abc"}
    assert device.report() == {"conditions": CONDITIONS, "is_complete": True, "cells": cells}
    assert {file.name for file in device.folder.iterdir()} == {"first.json", "second.json"}
    assert device.process() and not device.measured


def test_a_cell_that_fails_is_named_and_the_others_go_on(device):
    device.failing.add("b")
    assert device.process()
    assert device.measured == ["a", "b", "c", "d", "e"]  # once in a process
    report = device.report()
    (problem,) = device.step("first", "abc").problems()
    assert problem == f"b: {report['cells']['b']['error']}" and report["cells"]["b"]["tries"] == 1
    assert "RuntimeError at test_steps.py:" in problem
    assert report["cells"]["c"]["value"] == "c" and not report["is_complete"]
    device.failing.clear()
    device.git_commit = "with the fix"
    assert device.process() and device.measured == ["b"]
    cells = device.report()["cells"]
    assert device.report()["is_complete"] and cells["b"] == {"git_commit": "with the fix", "value": "b"}
    assert cells["a"]["git_commit"] == cells["c"]["git_commit"] == "abc"


def test_what_failed_waits_for_what_was_never_tried(device):
    device.failing |= {"a", "b"}
    device.process(num_cells=2)
    device.process(num_cells=4)
    assert device.measured == ["c", "d", "e", "a"]
    device.process(num_cells=1)
    assert device.measured == ["b"]  # which was tried less often


def test_a_part_that_failed_is_a_cell_that_failed(device):
    path = device.folder / "step.json"
    half = Cell("a", lambda: {"one": 1, "error": "two: is off"})
    step = Step(path, [half], read_report(path, CONDITIONS), None)
    assert run([step], lambda: False, lambda: None)
    assert step.problems() == ["a: two: is off"] and device.report("step")["cells"]["a"]["one"] == 1


def test_a_lost_device_ends_the_process_and_costs_no_other_cell(device):
    device.deadly.add("a")
    with pytest.raises(DeviceLostError, match="first, a: RuntimeError"):
        device.process()
    assert device.measured == ["a"] and set(device.report()["cells"]) == {"a"}
    with pytest.raises(DeviceLostError, match="first, a: RuntimeError"):
        device.process()
    assert device.measured == ["b", "c", "d", "e", "a"]
    assert device.report("second")["is_complete"] and device.report()["cells"]["a"]["tries"] == 2
    device.deadly.clear()
    assert device.process() and device.measured == ["a"] and device.report()["is_complete"]


def test_a_kill_while_a_cell_is_measured_is_a_failure_of_it(device):
    def killed() -> dict:
        raise SystemExit(143)

    path = device.folder / "first.json"
    step = Step(path, [Cell("a", killed)], read_report(path, CONDITIONS), None)
    with pytest.raises(SystemExit):
        run([step], lambda: False, lambda: None)
    (problem,) = device.step("first", "abc").problems()
    assert problem == "a: the process ended while this was measured"
    assert device.process() and device.measured == ["b", "c", "d", "e", "a"]
    assert device.report()["is_complete"]


def test_a_file_of_other_conditions_is_refused(device):
    device.process()
    other = {**CONDITIONS, "device": "cuda: another"}
    with pytest.raises(ValueError, match="measured with device 'cuda: a GPU', now it is 'cuda: another'"):
        device.step("first", "abc", other)
    (device.folder / "first.json").write_text("{")
    with pytest.raises(ValueError, match="not a report of this script"):
        device.step("first", "abc")
