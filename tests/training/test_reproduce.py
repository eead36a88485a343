"""Tables of the paper: their cells, what is run and what is not, and the report."""

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reproduce
from fambav_training.cli import parse_arguments
from fambav_training.fusion.multiply_adds import multiply_adds
from fambav_training.paper import report as table_report
from fambav_training.paper import runs as table_runs
from fambav_training.paper import tables as paper_tables
from fambav_training.paper.runs import Run
from fambav_training.paper.tables import model_fields, table_cells
from fambav_training.run.arguments import TrainingArguments
from modeling_fambav import FambaVConfig
from support.child_process import REPOSITORY, run_python

# Stands in for train.py: prints, and leaves results if it is given any
_WRITE_RESULTS = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "all_results.json").write_text(sys.argv[2])
print("trained")
"""
_FAIL = "print('epoch 1'); print('out of memory'); raise SystemExit(3)"
# By cell: accuracy with seed 0, seconds, peak memory in MiB
_MEASURED = {
    "none": (50.0, 100.0, 1000),
    "all": (40.0, 80.0, 700),
    "interleaved": (44.0, 75.0, 650),
    "lower": (42.0, 60.0, 600),
    "upper": (49.0, 70.0, 800),
}


def hand_made_results(run: Run, **changes: Any) -> dict[str, Any]:
    """What train.py would write, with numbers from `_MEASURED`; each seed adds one point of accuracy."""
    args, overrides = parse_arguments(TrainingArguments, "", run.words)
    top1, seconds, mebibytes = _MEASURED.get(run.cell, (30.0, 90.0, 900))
    return {
        "top1": top1 + run.seed,
        "top5": top1 + 40,
        "ema_top1": top1 + 2,
        "train_seconds": seconds + 10 * run.seed,
        "processor_seconds": 1.5 * seconds,
        "peak_memory_bytes": mebibytes * 2**20,
        "start_memory_bytes": 300 * 2**20,
        "sequence_lengths": FambaVConfig(**overrides).sequence_lengths,
        "device": "cpu: a processor",
        "scan_backend": "numba",
        "versions": {"torch": "9.9"},
        "git_commit": "abc",
        "arguments": {**dataclasses.asdict(args), "output_dir": str(args.output_dir), **overrides},
        **changes,
    }


@pytest.fixture
def failing(monkeypatch) -> Iterator[set[str]]:
    """Runs are stand-ins that take no time. Those of the cells in this set, empty at first, fail."""
    cells = set()

    def command(run: Run) -> list[str]:
        if run.cell in cells:
            return [sys.executable, "-c", _FAIL]
        return [sys.executable, "-c", _WRITE_RESULTS, str(run.folder), json.dumps(hand_made_results(run))]

    monkeypatch.setattr(Run, "command", property(command))
    handler = signal.getsignal(signal.SIGTERM)
    yield cells
    signal.signal(signal.SIGTERM, handler)


def reproduce_quick(folder: Path, *words: str) -> Path:
    """Run table 1 at scale quick; returns the folder of the table."""
    reproduce.main(["--table", "1", "--scale", "quick", "--output_dir", str(folder), *words])
    return folder / "table1_quick"


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {record["cell"]: record for record in json.loads((folder / "table.json").read_text())["cells"]}


def markdown_rows(folder: Path, header: str) -> dict[str, dict[str, str]]:
    """The rows of that table of table.md which has a column of this name, by their first column."""
    lines = (folder / "table.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|") and f"| {header}" in line)
    names, rows = [name.strip() for name in lines[start].split("|")[1:-1]], {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        values = [value.strip() for value in line.split("|")[1:-1]]
        rows[values[0]] = dict(zip(names, values))
    return rows


# ---- cells ----


def test_cells_at_224_px_are_those_of_the_paper():
    flags = paper_tables.SCALES["paper"]
    assert {cell.name: cell.fields for cell in table_cells("1", flags, "ti")} == {
        "none": {"fusion_strategy": "none"},
        "all": {"fusion_strategy": "all", "fusion_tokens": 7},
        "interleaved": {"fusion_strategy": "interleaved", "fusion_tokens": 14},
        "lower": {"fusion_strategy": "lower", "fusion_tokens": 9},
        "upper": {"fusion_strategy": "upper", "fusion_tokens": 9},
    }
    table_2 = {cell.name: cell for cell in table_cells("2", flags, "ti")}
    assert table_2["start15"].fields == {
        "fusion_strategy": "upper",
        "fusion_tokens": 15,
        "fusion_start_layer": 14,
    }
    assert table_2["start2"].fields == {"fusion_strategy": "upper", "fusion_tokens": 7, "fusion_start_layer": 1}
    assert list(table_2) == ["none", *(f"start{start}" for start in range(15, 1, -1))]
    assert all(cell.same_as is None for cell in table_2.values())
    table_3 = {cell.name: cell.fields for cell in table_cells("3", flags, "ti")}
    assert table_3 == {
        "none": {"fusion_strategy": "none"},
        **{f"r{r}": {"fusion_strategy": "upper", "fusion_tokens": r} for r in range(9, 0, -1)},
    }


def test_the_papers_rows_that_are_the_same_run_have_the_same_numbers():
    assert paper_tables.TABLE_1["ti"]["upper"] == paper_tables.TABLE_2[6][1] == paper_tables.TABLE_3[9]
    assert paper_tables.TABLE_1["ti"]["none"].train_seconds == 4 * 3600 + 33 * 60 + 2


@pytest.mark.parametrize("scale", paper_tables.SCALES)
@pytest.mark.parametrize(
    ("table", "backbone"),
    [("1", "ti"), ("1", "s"), ("2", "ti"), ("3", "ti"), ("ablation", "ti"), ("ablation", "s"), ("order", "ti")],
)
def test_every_cell_is_a_command_that_train_py_reads(scale, table, backbone):
    words = ["--table", table, "--scale", scale, "--backbone", backbone]
    flags = reproduce.shared_flags(reproduce.parse(words))
    cells = table_cells(table, flags, backbone)
    runs = table_runs.table_runs(cells, [0, 1], flags, Path("table"), Path("table1"))
    for cell in cells:
        assert len(runs[cell.name]) == (2 if cell.same_as is None else 0)
        for run in runs[cell.name]:
            args, overrides = parse_arguments(TrainingArguments, "", run.words)
            assert args.seed == run.seed and args.checkpointing_steps == "epoch"
            assert overrides["hidden_size"] == flags["hidden_size"]
            assert (sum(FambaVConfig(**overrides).tokens_removed) > 0) == (cell.name != "none")


def test_vim_s_is_twice_as_wide():
    def width(backbone: str) -> int:
        return reproduce.shared_flags(reproduce.parse(["--table", "1", "--backbone", backbone]))["hidden_size"]

    assert width("s") == 2 * width("ti")


def test_starting_layers_that_coincide_are_run_once():
    cells = {cell.name: cell for cell in table_cells("2", paper_tables.SCALES["nano"], "ti")}
    same_as = {name: cell.same_as for name, cell in cells.items() if cell.same_as is not None}
    assert same_as == {
        "start14": "start13",
        "start12": "start13",
        "start10": "start9",
        "start8": "start9",
        "start6": "start5",
        "start4": "start5",
    }
    for name, other in same_as.items():
        assert cells[name].fields == cells[other].fields
    runs = table_runs.table_runs(list(cells.values()), [0], paper_tables.SCALES["nano"], Path("table"), Path("table1"))
    chosen = reproduce.choose_runs(list(cells.values()), runs, ["start12", "start14"])
    assert [run.cell for run in chosen] == ["start13"]


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


def test_the_papers_upper_is_one_run_in_all_tables():
    flags = paper_tables.SCALES["paper"]
    for table, name in (("2", "start6"), ("3", "r9"), ("ablation", "upper")):
        in_table_1 = {cell.name: cell.in_table_1 for cell in table_cells(table, flags, "ti")}
        assert in_table_1.pop("none") == "none" and in_table_1.pop(name) == "upper"
        assert not any(in_table_1.values())


def test_another_seed_of_a_row_of_table_1_is_trained(failing, tmp_path):
    reproduce_quick(tmp_path, "--cells", "none")
    folder = tmp_path / "table2_quick"
    words = ["--table", "2", "--scale", "quick", "--output_dir", str(tmp_path), "--cells", "none", "--seeds", "2"]
    reproduce.main(words)
    assert not (folder / "none_seed0").exists() and (folder / "none_seed1").exists()
    assert read_cells(folder)["none"]["seeds_finished"] == 2


# ---- the report ----


def test_report_has_the_numbers_of_the_runs_beside_those_of_the_paper(failing, tmp_path):
    folder = reproduce_quick(tmp_path)
    assert (folder / "table.png").stat().st_size > 5000
    cells = read_cells(folder)
    assert list(cells) == ["none", "all", "interleaved", "lower", "upper"]
    for name, (top1, seconds, mebibytes) in _MEASURED.items():
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


@pytest.mark.parametrize("scale", paper_tables.SCALES)
def test_finished_runs_of_every_scale_are_read_and_those_of_another_recipe_refused(scale, tmp_path):
    flags = paper_tables.SCALES[scale]
    [run] = table_runs.table_runs(table_cells("1", flags, "ti"), [0], flags, tmp_path, tmp_path)["upper"]
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
    [run] = table_runs.table_runs(cells, [0], paper_tables.SCALES["quick"], tmp_path, tmp_path)["upper"]
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


def test_order_has_both_orders_of_rows_of_table_1():
    flags = paper_tables.SCALES["distilled"]
    cells = {cell.name: cell for cell in table_cells("order", flags, "ti")}
    in_table_1 = {cell.name: cell.fields for cell in table_cells("1", flags, "ti")}
    assert list(cells) == ["none", "all", "all_appended", "lower", "lower_appended", "upper", "upper_appended"]
    for name in ("none", "all", "lower", "upper"):
        assert cells[name].fields == in_table_1[name] and cells[name].in_table_1 == name
    for name in ("all", "lower", "upper"):
        appended = cells[f"{name}_appended"]
        assert appended.fields == {**in_table_1[name], "fusion_order": "appended"} and appended.in_table_1 is None


@pytest.mark.parametrize("scale", ["distilled", "native32"])
def test_equal_work_has_unfused_models_of_as_many_multiply_adds(scale):
    flags = paper_tables.SCALES[scale]
    cells = {cell.name: cell for cell in table_cells("work", flags, "ti")}
    assert list(cells) == ["none", "upper", "narrow", "shallow"]
    assert cells["upper"].in_table_1 == "upper" and cells["none"].in_table_1 == "none"
    assert cells["narrow"].in_table_1 is None and cells["shallow"].in_table_1 is None
    configs = {name: FambaVConfig(**{**model_fields(flags), **cell.fields}) for name, cell in cells.items()}
    of_upper = multiply_adds(configs["upper"])
    assert multiply_adds(configs["none"]) > 1.4 * of_upper
    for name, field in (("narrow", "hidden_size"), ("shallow", "num_hidden_layers")):
        assert configs[name].fusion_strategy == "none"
        assert getattr(configs[name], field) < flags[field]
        assert multiply_adds(configs[name]) == pytest.approx(of_upper, rel=0.05)


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
    assert table_report.duration(seconds) == text


# ---- what is run ----


def test_finished_runs_are_not_run_again(failing, tmp_path, capsys):
    folder = reproduce_quick(tmp_path, "--cells", "upper")
    before = (folder / "upper_seed0.train.log").read_text()
    failing.update(_MEASURED)  # whatever is run from now on fails
    reproduce_quick(tmp_path, "--cells", "upper")
    assert "upper_seed0: finished before" in capsys.readouterr().out
    assert (folder / "upper_seed0.train.log").read_text() == before


def test_more_seeds_add_to_those_that_are_there(failing, tmp_path, capsys):
    reproduce_quick(tmp_path, "--cells", "upper")
    capsys.readouterr()
    reproduce_quick(tmp_path, "--cells", "upper", "--seeds", "2")
    out = capsys.readouterr().out
    assert "upper_seed0: finished before" in out and "upper_seed1: top-1 50.00 %" in out


def test_table_fills_seed_by_seed(failing, tmp_path, capsys):
    reproduce_quick(tmp_path, "--cells", "none", "upper", "--seeds", "2")
    order = re.findall(r"(\w+_seed\d): training", capsys.readouterr().out)
    assert order == ["none_seed0", "upper_seed0", "none_seed1", "upper_seed1"]


def test_failing_cell_is_reported_and_the_others_still_run(failing, tmp_path, capsys):
    failing.add("all")
    with pytest.raises(SystemExit) as exit_info:
        reproduce_quick(tmp_path)
    assert "1 of 5 runs failed" in exit_info.value.code and "all_seed0" in exit_info.value.code
    out = capsys.readouterr().out
    assert "all_seed0: FAILED with exit code 3" in out and "out of memory" in out
    rows = markdown_rows(tmp_path / "table1_quick", "seeds")
    assert rows["all"]["top-1, %"] == "not run"
    assert [rows[name]["top-1, %"] for name in ("interleaved", "lower", "upper")] == ["44.00", "42.00", "49.00"]

    # The next call runs only what is missing.
    failing.clear()
    reproduce_quick(tmp_path)
    out = capsys.readouterr().out
    assert out.count("finished before") == 4 and "all_seed0: top-1 40.00 %" in out


def test_run_that_leaves_no_results_has_failed(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "command", property(lambda run: [sys.executable, "-c", "print('nothing')"]))
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        reproduce_quick(tmp_path, "--cells", "upper")


def test_other_arguments_are_refused(failing, tmp_path):
    folder = reproduce_quick(tmp_path, "--cells", "none")
    before = (folder / "table.json").read_text()
    with pytest.raises(SystemExit, match="trained with --num_train_epochs 2, expected 3, that of this call"):
        reproduce_quick(tmp_path, "--cells", "upper", "--epochs", "3")
    assert not (folder / "upper_seed0").exists() and (folder / "table.json").read_text() == before


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "uper"], "--cells uper: expected some of none all interleaved lower upper"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--epochs", "0"], "--epochs 0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_refused(failing, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        reproduce_quick(tmp_path, *words)
    assert message in f"{exit_info.value.code} {capsys.readouterr().err}"


def test_tables_2_and_3_have_no_vim_s(capsys):
    with pytest.raises(SystemExit):
        reproduce.parse(["--table", "2", "--backbone", "s"])
    assert "tables 2 and 3 have no Vim-S" in capsys.readouterr().err


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
        table_runs.launch(Run("upper", 0, tmp_path / "upper_seed0", {}))
    assert marker.read_text() == "saved"


# ---- with train.py ----


@pytest.mark.slow
def test_table_with_a_real_run_goes_on_where_it_was(tmp_path):
    """A cell from the command line; then it is made half-finished, and resumed."""

    def run_table() -> str:
        words = ("--table", "1", "--scale", "quick", "--cells", "upper", "--output_dir", "tables")
        process = run_python(REPOSITORY / "training" / "reproduce.py", *words, cwd=tmp_path)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    out = run_table()
    folder = tmp_path / "tables" / "table1_quick"
    results = json.loads((folder / "upper_seed0" / "all_results.json").read_text())
    upper, rows = read_cells(folder)["upper"], markdown_rows(folder, "seeds")
    assert upper["sequence_lengths"] == results["sequence_lengths"]
    assert upper["runs"][0]["results"] == results
    for measure in ("top1", "top5", "ema_top1", "train_seconds", "peak_memory_bytes"):
        assert upper["measured"][measure]["mean"] == results[measure]
    assert rows["upper"]["top-1, %"] == f"{results['top1']:.2f}"
    assert rows["all"]["top-1, %"] == "not run"
    text = (folder / "table.md").read_text()
    assert results["device"] in text and text in out
    assert (folder / "table.png").exists()

    # As if it had been stopped between the checkpoint of its last epoch and its results
    (folder / "upper_seed0" / "all_results.json").unlink()
    assert "upper_seed0: training" in run_table()
    resumed = json.loads((folder / "upper_seed0" / "all_results.json").read_text())
    # No step was taken again: the very same seconds and scores
    for name in ("steps", "train_seconds", "top1", "ema_top1"):
        assert resumed[name] == results[name]
