"""The report of a table: means, savings, and what is not a number."""

import json
from typing import Any

import pytest

import reproduce
from fambav_training.fusion.multiply_adds import multiply_adds
from fambav_training.paper import tables as paper_tables
from fambav_training.paper.report import duration
from fambav_training.paper.runs import Run
from fambav_training.paper.tables import model_fields
from modeling_fambav import FambaVConfig
from support.table_runs import MEASURED, hand_made_results, markdown_rows, read_cells, reproduce_quick


def test_report_has_the_numbers_of_the_runs_beside_those_of_the_paper(failing, tmp_path):
    folder = reproduce_quick(tmp_path)
    assert (folder / "table.png").stat().st_size > 5000
    cells = read_cells(folder)
    assert list(cells) == ["none", "all", "interleaved", "lower", "upper"]
    for name, (top1, seconds, mebibytes) in MEASURED.items():
        results = json.loads((folder / f"{name}_seed0" / "all_results.json").read_text())
        [run] = cells[name]["runs"]
        assert run["results"] == results
        assert cells[name]["measured"] == {
            "top1": {"mean": top1, "std": None},
            "top5": {"mean": top1 + 40, "std": None},
            "ema_top1": {"mean": top1 + 2, "std": None},
            "train_seconds": {"mean": seconds, "std": None},
            "processor_seconds": {"mean": 1.5 * seconds, "std": None},
            "peak_memory_bytes": {"mean": mebibytes * 2**20, "std": None},
            "training_memory_bytes": {"mean": (mebibytes - 300) * 2**20, "std": None},
        }
        assert cells[name]["sequence_lengths"] == results["sequence_lengths"]
    assert cells["upper"]["paper"] == {
        "top1": 70.5,
        "top5": 90.5,
        "training_time": "4:08:40",
        "peak_memory": 5996,
        "train_seconds": 14920,
    }
    upper = markdown_rows(folder, "seeds")["upper"]
    assert upper == {
        "cell": "upper",
        "seeds": "1 of 1",
        "top-1, %": "49.00",
        "top-1, paper": "70.5",
        "top-5, %": "89.00",
        "top-5, paper": "90.5",
        "top-1 of averaged weights, %": "51.00",
        "multiply-adds, M": f"{cells['upper']['multiply_adds'] / 1e6:.1f}",
        "training time": "70.0 s",
        "processor time": "0:01:45",
        "time, paper": "4:08:40",
        "training memory, MiB": "500",
        "memory, paper": "5996",
    }
    text = (folder / "table.md").read_text()
    assert "Measured on cpu: a processor, scan backend numba; torch 9.9; commit abc." in text
    assert "measured at 224 px" in text and "may not compare" not in text


def test_savings_stand_beside_the_limit_that_the_multiply_adds_set(failing, tmp_path):
    folder = reproduce_quick(tmp_path)
    cells, rows = read_cells(folder), markdown_rows(folder, "limit")
    saved = cells["upper"]["saved"]
    flags = model_fields(paper_tables.SCALES["quick"])
    work = {name: multiply_adds(FambaVConfig(**flags, **cells[name]["fields"])) for name in ("none", "upper")}
    assert saved["multiply_adds"] == pytest.approx(1 - work["upper"] / work["none"]) and saved["multiply_adds"] > 0.2
    assert saved["time"] == pytest.approx(0.3) and saved["memory"] == pytest.approx(2 / 7)  # 500 of 700 MiB
    assert rows["upper"]["time"] == "30.0%" and rows["upper"]["memory"] == "28.6%"
    assert rows["upper"]["time, paper"] == "8.9%"  # 4:08:40 of 4:33:02
    assert rows["upper"]["memory, paper"] == "27.8%"  # 5996 of 8302
    assert rows["no fusion"]["time"] == rows["no fusion"]["limit"] == "0.0%"


def test_time_saved_is_that_of_the_processor_on_a_cpu_and_of_the_clock_on_a_gpu(failing, tmp_path, monkeypatch):
    def results(run: Run, device: str) -> dict[str, Any]:
        return hand_made_results(run, device=device, processor_seconds=200.0 if run.cell == "none" else 50.0)

    for device, share, name in (("cpu: a processor", "75.0%", "processor time"), ("cuda: a GPU", "30.0%", "time")):
        monkeypatch.setattr(Run, "results", lambda run, device=device: results(run, device))
        folder = reproduce_quick(tmp_path / name)
        assert markdown_rows(folder, "limit")["upper"]["time"] == share
        assert f"### Saved of the {name} and memory without fusion" in (folder / "table.md").read_text()


def test_ablation_varies_fusion_and_has_no_columns_of_the_paper(failing, tmp_path):
    reproduce.main(["--table", "ablation", "--scale", "quick", "--output_dir", str(tmp_path)])
    folder = tmp_path / "ablation_quick"
    cells = read_cells(folder)
    assert list(cells) == ["none", *paper_tables.ABLATION]
    upper = cells["upper"]["fields"]
    for name, (_, fields) in paper_tables.ABLATION.items():
        assert cells[name]["fields"] == {**upper, **fields}
        assert cells[name]["sequence_lengths"] == cells["upper"]["sequence_lengths"]
        defaults = FambaVConfig()
        assert all(value != getattr(defaults, field) for field, value in fields.items())
    assert "paper" not in (folder / "table.md").read_text()
    assert markdown_rows(folder, "limit")["appended order, as published"].keys() == {"cell", "time", "limit", "memory"}


def test_mean_and_deviation_over_seeds(failing, tmp_path):
    folder = reproduce_quick(tmp_path, "--seeds", "3", "--cells", "upper")
    upper = read_cells(folder)["upper"]
    assert upper["seeds_finished"] == 3 and [run["seed"] for run in upper["runs"]] == [0, 1, 2]
    # 49, 50, 51 and 70, 80, 90: with n - 1, deviations of 1 and 10
    assert upper["measured"]["top1"] == {"mean": pytest.approx(50), "std": pytest.approx(1)}
    assert upper["measured"]["train_seconds"] == {"mean": pytest.approx(80), "std": pytest.approx(10)}
    assert upper["measured"]["top5"]["std"] == 0
    row = markdown_rows(folder, "seeds")["upper"]
    assert row["seeds"] == "3 of 3"
    assert row["top-1, %"] == "50.00 ± 1.00" and row["training time"] == "80.0 s ± 10.0 s"


def test_savings_compare_runs_of_the_same_seed(failing, tmp_path, monkeypatch):
    """The second seed ran on a machine of twice the speed; interleaved ran only there."""

    def results(run: Run) -> dict[str, Any] | None:
        ours = hand_made_results(run)
        measured = {**ours, "processor_seconds": ours["processor_seconds"] / (1 + run.seed)}
        return None if (run.cell, run.seed) == ("interleaved", 0) else measured

    monkeypatch.setattr(Run, "results", results)
    cells = read_cells(reproduce_quick(tmp_path, "--seeds", "2", "--cells", "none"))
    assert cells["interleaved"]["seeds_finished"] == 1
    for name in ("interleaved", "upper"):
        assert cells[name]["saved"]["time"] == pytest.approx(1 - MEASURED[name][1] / 100)


def test_missing_cells_are_not_numbers(failing, tmp_path):
    folder = reproduce_quick(tmp_path, "--cells", "upper")
    cells = read_cells(folder)
    assert cells["none"]["measured"] is None and cells["none"]["runs"][0]["results"] is None
    # Nothing is saved of what was not measured.
    assert cells["upper"]["saved"]["time"] is None and cells["upper"]["saved"]["memory"] is None
    rows = markdown_rows(folder, "seeds")
    ours = ("top-1, %", "top-5, %", "top-1 of averaged weights, %", "training time", "training memory, MiB")
    assert {rows["no fusion"][name] for name in ours} == {"not run"}
    assert rows["no fusion"]["seeds"] == "0 of 1" and rows["no fusion"]["top-1, paper"] == "70.1"
    assert rows["upper"]["top-1, %"] == "49.00"
    assert markdown_rows(folder, "limit")["upper"]["time"] == "not run"


def test_coinciding_cells_say_so_in_the_table(failing, tmp_path):
    reproduce.main(["--table", "2", "--scale", "nano", "--cells", "start12", "--output_dir", str(tmp_path)])
    folder = tmp_path / "table2_nano"
    rows = markdown_rows(folder, "seeds")
    assert rows["upper, 12 from layer 12"]["top-1, %"] == "same as start13"
    assert rows["upper, 12 from layer 12"]["top-1, paper"] == "72.3"
    assert rows["upper, 13 from layer 13"]["top-1, %"] == "30.00"
    assert "start at the same layer" in (folder / "table.md").read_text()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["start13_seed0"]


def test_other_conditions_are_pointed_out(failing, tmp_path):
    folder = reproduce_quick(tmp_path, "--cells", "none", "upper")
    path = folder / "upper_seed0" / "all_results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda: another"}))
    reproduce_quick(tmp_path, "--cells", "upper")
    text = (folder / "table.md").read_text()
    assert "Measured on cpu: a processor" in text and "Measured on cuda: another" in text
    assert "times and memory may not compare" in text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (99.9, "99.9 s"), (14920, "4:08:40")])
def test_duration(seconds, text):
    assert duration(seconds) == text
