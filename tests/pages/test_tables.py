"""Accuracies on the pages are those of the files that were measured."""

import json
from typing import Any

import pytest

from support.pages import MEASURED, MODEL_CARDS, README, read_json, sentences, tables


def cells_of(table: str) -> dict[str, dict[str, Any]]:
    return {cell["cell"]: cell for cell in read_json("tables", table, "table.json")["cells"]}


def of_seeds(cell: dict[str, Any], measure: str, digits: int) -> str:
    """What the runs of a cell measured, by seed; a hyphen for one that was left out."""
    results = [run["results"] for run in cell["runs"]]
    while results and results[-1] is None:
        results.pop()
    return ", ".join("-" if result is None else f"{result[measure]:.{digits}f}" for result in results)


def top1_of_seeds(cell: dict[str, Any]) -> str:
    return of_seeds(cell, "top1", 2)


def measured_row(title: str, cell: dict[str, Any]) -> list[str]:
    """A row of the paper's tables, as README and model_cards print it."""
    measured, saved, is_first = cell["measured"], cell["saved"], cell["cell"] == "none"
    return [
        title,
        top1_of_seeds(cell),
        f"{measured['top5']['mean']:.2f}",
        f"{measured['processor_seconds']['mean']:.0f} s",
        "" if is_first else f"{saved['time']:.0%} of {saved['tokens']:.0%}",
        f"{cell['paper']['top1']}",
        "" if is_first else f"{saved['paper_time']:.0%}",
    ]


TABLE_2 = (
    "| fusion begins at layer, paper (ours) | top-1, % | top-5, % | processor time | "
    "saved, of what the tokens allow | top-1, paper | time saved, paper |"
)
TABLE_3 = (
    "| tokens per fused layer, paper (in all, ours) | top-1, % | top-5, % | processor time | "
    "saved, of what the tokens allow | top-1, paper | time saved, paper |"
)


def test_training_with_each_strategy_is_what_was_measured():
    rows = []
    for name, cell in cells_of("table1_distilled").items():
        if cell["measured"] is None:
            continue
        measured, saved, is_first = cell["measured"], cell["saved"], name == "none"
        rows.append(
            [
                name,
                top1_of_seeds(cell),
                f"{cell['multiply_adds'] / 1e6:.1f}",
                of_seeds(cell, "processor_seconds", 0),
                "" if is_first else f"{saved['time']:.0%} of {saved['multiply_adds']:.0%}",
                f"{measured['training_memory_bytes']['mean'] / 2**20:.0f}",
                f"{cell['paper']['top1']}",
            ]
        )
    header = (
        "| trained with | top-1, %, seeds 0 and 1 | multiply-adds, M | processor time, s | "
        "saved, of what the multiply-adds allow | training memory, MiB | top-1, paper |"
    )
    assert tables(MODEL_CARDS)[header] == rows


def test_smaller_models_of_equal_work_are_what_was_measured():
    rows = [
        [
            cell["title"],
            f"{cell['multiply_adds'] / 1e6:.1f}",
            top1_of_seeds(cell),
            of_seeds(cell, "processor_seconds", 0),
        ]
        for cell in cells_of("work_distilled").values()
        if cell["measured"] is not None
    ]
    header = "| model | multiply-adds, M | top-1, %, seeds 0 and 1 | processor time, s |"
    assert tables(MODEL_CARDS)[header] == rows


def test_eight_epochs_are_what_was_measured():
    cells = cells_of("table1_distilled_8_epochs")
    none, upper = (cells[name]["measured"]["top1"]["mean"] for name in ("none", "upper"))
    text = sentences(MODEL_CARDS)
    assert f"with seed 0, `none` has {none:.2f} % and `upper` {upper:.2f} %" in text
    assert (
        f"saves {100 * cells['upper']['saved']['time']:.0f} % of the time and costs {none - upper:.1f} points" in text
    )


def test_training_in_both_orders_is_what_was_measured():
    raster = cells_of("table1_distilled")
    published = {
        name: read_json("tables", "order_distilled", f"{name}_appended_seed1.json") for name in ("all", "lower")
    }
    published["upper"] = cells_of("order_distilled")["upper_appended"]["runs"][1]["results"]
    published["none"] = raster["none"]["runs"][1]["results"]  # which has no order
    for name, run in published.items():
        order = "raster" if name == "none" else "appended"
        assert run["seed"] == 1 and run["arguments"].get("fusion_order", "raster") == order
    rows = [
        [name, top1_of_seeds(cell), f"{published[name]['top1']:.2f}", f"{cell['paper']['top1']}"]
        for name, cell in raster.items()
        if name != "interleaved"
    ]
    header = (
        "| trained with | raster order, top-1, %, seeds 0 and 1 | published order, seed 1 | published order, paper |"
    )
    assert tables(MODEL_CARDS)[header] == rows
    costs = {name: published["none"]["top1"] - run["top1"] for name, run in published.items()}
    sentence = "in all layers costs {all:.1f} points, in the lower ones {lower:.1f} and in the upper ones {upper:.1f}"
    assert sentence.format(**costs) in sentences(MODEL_CARDS)


def test_recovery_is_what_was_measured():
    """Epochs without and with the unfused model as a teacher, after fusion was switched on; a hyphen if not run."""
    switched_on = {row["strategy"]: row["top1"] for row in read_json("tables", "recovery", "sweep.json")["rows"]}
    runs = {path.stem: json.loads(path.read_text()) for path in (MEASURED / "tables" / "recovery").glob("*_*.json")}
    rows = []
    for strategy in ("none", "all", "lower", "upper"):
        names = [f"{strategy}_{epochs}{taught}" for taught in ("", "_taught") for epochs in (1, 3)]
        after = [f"{runs[name]['top1']:.2f}" if name in runs else "-" for name in names]
        rows.append([strategy, f"{switched_on[strategy]:.2f}", *after])
    header = "| fusion | switched on, top-1, % | 1 epoch | 3 epochs | 1 epoch, taught | 3 epochs, taught |"
    assert tables(MODEL_CARDS)[header] == rows


def switched_on() -> dict[tuple[str, str], list[float]]:
    """Top-1 by strategy and order of the model trained without fusion, from few multiply-adds saved to many."""
    unfused, *rows = read_json("tables", "fusion_by_multiply_adds", "sweep.json")["rows"]
    found: dict[tuple[str, str], list[float]] = {("none", ""): [unfused["top1"]]}
    for row in rows:
        found.setdefault((row["strategy"], row["changes"]["fusion_order"]), []).append(row["top1"])
    return found


def test_fusion_by_multiply_adds_is_what_was_measured():
    titles = {"raster": "raster", "appended": "published"}
    rows = [
        [strategy, titles[order], *(f"{top1:.2f}" for top1 in values)]
        for (strategy, order), values in switched_on().items()
        if strategy != "none"
    ]
    header = "| switched on | order | 10 % fewer multiply-adds | 20 % | 30 % | 40 % |"
    assert tables(MODEL_CARDS)[header] == rows


def test_the_strategies_in_the_readme_are_what_was_measured():
    afterwards = switched_on()
    rows = []
    for name, cell in cells_of("table1_distilled").items():
        if cell["measured"] is None:
            continue
        if name == "none":
            rows.append([name, top1_of_seeds(cell), *2 * [f"{afterwards['none', ''][0]:.2f}"]])
            continue
        at_30_percent = [f"{afterwards[name, order][2]:.2f}" for order in ("raster", "appended")]
        rows.append([name, top1_of_seeds(cell), *at_30_percent])
    header = "| top-1, % | trained with it, two seeds | switched on | switched on, in the published order |"
    assert tables(README)[header] == rows


@pytest.mark.parametrize(("table", "header"), [("table2_nano", TABLE_2), ("table3_nano", TABLE_3)])
def test_tables_2_and_3_are_what_was_measured(table, header):
    expected = []
    for cell in cells_of(table).values():
        if cell["measured"] is None:
            continue
        removed = cell["tokens_removed"]
        if cell["cell"] == "none":
            title = "no fusion"
        elif table == "table2_nano":
            first = next(layer for layer, tokens in enumerate(removed, 1) if tokens)
            title = f"{cell['cell'].removeprefix('start')} ({first})"
        else:
            title = f"{cell['cell'].removeprefix('r')} ({sum(removed)})"
        expected.append(measured_row(title, cell))
    assert tables(MODEL_CARDS)[header] == expected


def test_the_ablation_is_what_was_measured():
    # What each cell changes, as evaluate_checkpoint.py --ablate names it
    changes = {
        "dot": {"fusion_metric": "dot"},
        "euclidean": {"fusion_metric": "euclidean"},
        "size_weighted": {"fusion_reduction": "size_weighted"},
        "appended": {"fusion_order": "appended"},
        "scaled_steps": {"fusion_scale_time_step": True},
        "both": {"fusion_reduction": "size_weighted", "fusion_scale_time_step": True},
    }
    switched_on = read_json("tables", "ablation_trained", "ablation.json")["rows"]

    def afterwards(cell: str) -> str:
        strategy = "none" if cell == "none" else "upper"
        (row,) = (r for r in switched_on if (r["strategy"], r["changes"]) == (strategy, changes.get(cell, {})))
        return f"{row['top1']:.2f}"

    trained = cells_of("ablation_nano")
    expected = [[cell["title"], top1_of_seeds(cell), afterwards(name)] for name, cell in trained.items()]
    header = "| fusion | trained with it, top-1 of the seeds, % | switched on afterwards, top-1, % |"
    assert sorted(tables(MODEL_CARDS)[header]) == sorted(expected)


def test_fusion_switched_on_afterwards_is_what_was_measured():
    rows = {
        order: read_json("tables", "fusion_afterwards", f"{order}.json")["rows"] for order in ("raster", "appended")
    }
    all_tokens = rows["raster"][0]["mean_tokens"]
    expected = []
    for raster, appended in zip(*rows.values(), strict=True):
        assert (raster["strategy"], raster["tokens"]) == (appended["strategy"], appended["tokens"])
        unseen = f"{1 - raster['mean_tokens'] / all_tokens:.0%}"
        top1 = [f"{row['top1']:.2f}" for row in (raster, appended)]
        expected.append([raster["strategy"], str(raster["tokens"] or ""), unseen, *top1])
    header = (
        "| fusion | tokens removed per fused layer | tokens that the layers do not see | raster order, top-1, % | "
        "published order, top-1, % |"
    )
    assert tables(MODEL_CARDS)[header] == expected
