"""reproduce.py: what it trains and what it only reads, and its arguments."""

import json
import re
import sys

import pytest

import reproduce
from fambav_training.paper.runs import Run
from support.child_process import REPOSITORY, run_python
from support.table_runs import MEASURED, markdown_rows, read_cells, reproduce_quick


def test_vim_s_is_twice_as_wide():
    def width(backbone: str) -> int:
        return reproduce.shared_flags(reproduce.parse(["--table", "1", "--backbone", backbone]))["hidden_size"]

    assert width("s") == 2 * width("ti")


def test_finished_runs_are_not_run_again(failing, tmp_path, capsys):
    folder = reproduce_quick(tmp_path, "--cells", "upper")
    before = (folder / "upper_seed0.train.log").read_text()
    failing.update(MEASURED)  # whatever is run from now on fails
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


def test_recording_is_a_flag_of_all_runs_and_changes_none_of_them():
    plain, recorded = (
        reproduce.shared_flags(reproduce.parse(["--table", "1", *more])) for more in ([], ["--cuda_graphs"])
    )
    assert recorded == {**plain, "cuda_graphs": True} and "cuda_graphs" not in plain
