"""The runs behind a table: which results are a row's, and which are refused."""

import json
import os
import sys

import pytest

import reproduce
from fambav_training.paper import tables as paper_tables
from fambav_training.paper.runs import Run, launch, table_runs
from fambav_training.paper.tables import table_cells
from support.table_runs import hand_made_results, read_cells, reproduce_quick


def test_rows_that_table_1_has_are_not_trained_again(failing, tmp_path):
    reproduce_quick(tmp_path, "--cells", "none", "upper")
    first = read_cells(tmp_path / "table1_quick")
    for table, same in (("3", {"none": "none", "r9": "upper"}), ("ablation", {"none": "none", "upper": "upper"})):
        reproduce.main(["--table", table, "--scale", "quick", "--output_dir", str(tmp_path)])
        folder = tmp_path / (f"table{table}_quick" if table == "3" else "ablation_quick")
        cells = read_cells(folder)
        for cell, record in cells.items():
            assert (folder / f"{cell}_seed0").exists() == (cell not in same)
            if cell in same:
                [run], [run_in_table_1] = record["runs"], first[same[cell]]["runs"]
                assert run["results"] == run_in_table_1["results"] and run["folder"] == run_in_table_1["folder"]
            assert record["seeds_finished"] == 1


def test_rows_of_table_1_with_other_flags_are_another_run(failing, tmp_path):
    first = reproduce_quick(tmp_path, "--cells", "none") / "none_seed0" / "all_results.json"
    before = first.read_text()
    words = ["--table", "3", "--scale", "quick", "--output_dir", str(tmp_path), "--cells", "none", "--epochs", "1"]
    reproduce.main(words)
    assert (tmp_path / "table3_quick" / "none_seed0" / "all_results.json").exists()
    assert first.read_text() == before


def test_another_seed_of_a_row_of_table_1_is_trained(failing, tmp_path):
    reproduce_quick(tmp_path, "--cells", "none")
    folder = tmp_path / "table2_quick"
    words = ["--table", "2", "--scale", "quick", "--output_dir", str(tmp_path), "--cells", "none", "--seeds", "2"]
    reproduce.main(words)
    assert not (folder / "none_seed0").exists() and (folder / "none_seed1").exists()
    assert read_cells(folder)["none"]["seeds_finished"] == 2


@pytest.mark.parametrize("scale", paper_tables.SCALES)
def test_finished_runs_of_every_scale_are_read_and_those_of_another_recipe_refused(scale, tmp_path):
    flags = paper_tables.SCALES[scale]
    [run] = table_runs(table_cells("1", flags, "ti"), [0], flags, tmp_path, tmp_path)["upper"]
    run.folder.mkdir()
    results = json.loads(json.dumps(hand_made_results(run)))
    (run.folder / "all_results.json").write_text(json.dumps(results))
    assert run.results() == results
    results["arguments"]["learning_rate"] = 0.5
    (run.folder / "all_results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"trained with --learning_rate 0\.5, expected 0\.0"):
        run.results()


def test_results_that_are_no_row_of_this_table_are_refused(tmp_path):
    cells = table_cells("1", paper_tables.SCALES["quick"], "ti")
    [run] = table_runs(cells, [0], paper_tables.SCALES["quick"], tmp_path, tmp_path)["upper"]
    run.folder.mkdir()
    results = hand_made_results(run)
    distilled = {**results, "arguments": {**results["arguments"], "distillation_weight": 0.5}}
    old = {name: value for name, value in results.items() if name != "processor_seconds"}
    for wrong, message in ((distilled, "trained with --distillation_"), (old, "without processor_seconds")):
        (run.folder / "all_results.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            run.results()
    (run.folder / "all_results.json").write_text(json.dumps(results))
    assert run.results() == results


def test_fields_that_only_the_finished_run_has_are_refused(failing, tmp_path):
    folder = reproduce_quick(tmp_path, "--cells", "none")
    path = folder / "none_seed0" / "all_results.json"
    results = json.loads(path.read_text())
    results["arguments"]["fusion_order"] = "appended"
    path.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="trained with --fusion_order appended, expected None"):
        reproduce_quick(tmp_path)


def test_a_table_may_be_moved(failing, tmp_path, capsys):
    reproduce_quick(tmp_path / "before", "--cells", "none")
    (tmp_path / "before").rename(tmp_path / "after")
    capsys.readouterr()
    reproduce_quick(tmp_path / "after", "--cells", "none")  # flags that do not shape a run may differ
    assert "none_seed0: finished before" in capsys.readouterr().out


def test_stopping_the_table_stops_the_run(tmp_path, monkeypatch, default_signals):
    child = (
        "import os, pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        "    pathlib.Path(sys.argv[1]).write_text('saved')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    marker = tmp_path / "marker"
    monkeypatch.setattr(Run, "command", property(lambda run: [sys.executable, "-c", child, str(marker)]))
    with pytest.raises(KeyboardInterrupt):
        launch(Run("upper", 0, tmp_path / "upper_seed0", {}))
    assert marker.read_text() == "saved"
