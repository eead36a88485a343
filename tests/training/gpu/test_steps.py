"""Cells of a step: measured once, written one by one, tried again if they failed."""

import json

import pytest

from fambav_training.gpu.steps import Cell, failed_cells, run_step

CONDITIONS = {"device": "cuda: a GPU", "git_commit": "abc"}


class Counted:
    """Cells that count how often they are measured; those in `failing` raise."""

    def __init__(self):
        self.counts = dict.fromkeys("abc", 0)
        self.failing = set()

    def cells(self) -> list[Cell]:
        return [Cell(name, lambda name=name: self.measure(name)) for name in self.counts]

    def measure(self, name: str) -> dict:
        self.counts[name] += 1
        if name in self.failing:
            raise RuntimeError("out of memory")
        return {"value": self.counts[name]}


@pytest.fixture
def counted():
    return Counted()


def test_a_stop_between_cells_repeats_nothing(tmp_path, counted):
    path, answers = tmp_path / "out" / "step.json", iter([False, True])
    report = run_step(path, counted.cells(), CONDITIONS, lambda: next(answers))
    assert counted.counts == {"a": 1, "b": 0, "c": 0} and not report["is_complete"]
    assert json.loads(path.read_text()) == report
    report = run_step(path, counted.cells(), CONDITIONS, lambda: False)
    assert counted.counts == {"a": 1, "b": 1, "c": 1} and report["is_complete"]
    assert json.loads(path.read_text()) == {"conditions": CONDITIONS, **report}
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, counted):
    path = tmp_path / "step.json"
    counted.failing.add("b")
    report = run_step(path, counted.cells(), CONDITIONS, lambda: False)
    assert failed_cells(report) == [f"b: {report['cells']['b']['error']}"]
    assert "RuntimeError at test_steps.py:" in report["cells"]["b"]["error"]
    assert report["cells"]["c"] == {"value": 1} and not report["is_complete"]
    counted.failing.clear()
    report = run_step(path, counted.cells(), CONDITIONS, lambda: False)
    assert counted.counts == {"a": 1, "b": 2, "c": 1} and report["is_complete"] and not failed_cells(report)


def test_a_kill_while_a_cell_is_measured_leaves_the_file_before_it(tmp_path, counted):
    path = tmp_path / "step.json"

    def killed() -> dict:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_step(path, [*counted.cells(), Cell("d", killed)], CONDITIONS, lambda: False)
    assert set(json.loads(path.read_text())["cells"]) == {"a", "b", "c"}


def test_a_file_of_other_conditions_is_refused(tmp_path, counted):
    path = tmp_path / "step.json"
    run_step(path, counted.cells(), CONDITIONS, lambda: False)
    other = {**CONDITIONS, "device": "cuda: another"}
    with pytest.raises(ValueError, match="measured with device 'cuda: a GPU', now it is 'cuda: another'"):
        run_step(path, counted.cells(), other, lambda: False)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a report of this script"):
        run_step(path, counted.cells(), CONDITIONS, lambda: False)
