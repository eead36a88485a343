"""The rows of every table: the paper's numbers, and the fields of the runs beside them."""

from pathlib import Path

import pytest

import reproduce
from fambav_training.cli import parse_arguments
from fambav_training.fusion.multiply_adds import multiply_adds
from fambav_training.paper import tables as paper_tables
from fambav_training.paper.runs import table_runs
from fambav_training.paper.tables import model_fields, table_cells
from fambav_training.run.arguments import TrainingArguments
from modeling_fambav import FambaVConfig


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
    runs = table_runs(cells, [0, 1], flags, Path("table"), Path("table1"))
    for cell in cells:
        assert len(runs[cell.name]) == (2 if cell.same_as is None else 0)
        for run in runs[cell.name]:
            args, overrides = parse_arguments(TrainingArguments, "", run.words)
            assert args.seed == run.seed and args.checkpointing_steps == "epoch"
            assert overrides["hidden_size"] == flags["hidden_size"]
            assert (sum(FambaVConfig(**overrides).tokens_removed) > 0) == (cell.name != "none")


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
    runs = table_runs(list(cells.values()), [0], paper_tables.SCALES["nano"], Path("table"), Path("table1"))
    chosen = reproduce.choose_runs(list(cells.values()), runs, ["start12", "start14"])
    assert [run.cell for run in chosen] == ["start13"]


def test_the_papers_upper_is_one_run_in_all_tables():
    flags = paper_tables.SCALES["paper"]
    for table, name in (("2", "start6"), ("3", "r9"), ("ablation", "upper")):
        in_table_1 = {cell.name: cell.in_table_1 for cell in table_cells(table, flags, "ti")}
        assert in_table_1.pop("none") == "none" and in_table_1.pop(name) == "upper"
        assert not any(in_table_1.values())


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
