"""Numbers on the pages are those of the files that were measured, and links lead somewhere."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import demo
from support.child_process import REPOSITORY

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(REPOSITORY / folder / "README.md" for folder in ("modeling_fambav", "training", "model_cards")),
]
README, MODEL_CARDS = REPOSITORY / "README.md", REPOSITORY / "model_cards" / "README.md"
MEASURED = REPOSITORY / "model_cards"
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

Rows = list[list[str]]


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def tables(page: Path) -> dict[str, Rows]:
    """The Markdown tables of a page outside code: header as it is written, and cells of the rows below it."""
    text = _CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, Rows] = {}
    header = None
    for line, below in pairwise([*text.splitlines(), ""]):
        if not line.startswith("|"):
            header = None
        elif re.fullmatch(r"[|\s:-]+", below) and header is None:
            assert line not in found, f"two tables with the header {line}"
            header, found[line] = line, []
        elif header is not None and not re.fullmatch(r"[|\s:-]+", line):
            found[header].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def read_json(*path: str) -> dict[str, Any]:
    return json.loads(MEASURED.joinpath(*path).read_text(encoding="utf-8"))


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


def test_upper_fusion_in_both_orders_is_what_was_measured():
    cells = cells_of("order_distilled")
    raster, published = (cells[name]["runs"][1]["results"]["top1"] for name in ("upper", "upper_appended"))
    sentence = f"upper fusion has {published:.2f} % with seed 1, where raster order has {raster:.2f}"
    assert sentence in " ".join(MODEL_CARDS.read_text(encoding="utf-8").split())


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


def benchmark(title: str) -> dict[str, dict[str, Any]]:
    records = read_json("benchmarks", "cpu_2_cores", "benchmark.json")["results"][title]
    return {record["label"]: record for record in records}


def both_times(record: dict[str, Any]) -> str:
    return ", ".join(f"{1000 * record[name]:.0f}" for name in ("forward_seconds", "step_seconds"))


def both_ratios(record: dict[str, Any], reference: dict[str, Any]) -> str:
    return ", ".join(f"{record[name] / reference[name]:.2f}" for name in ("forward_seconds", "step_seconds"))


SIZES = (384, 512, 768, 1024)  # px, of one image


def sizes_row(title: str, batch_size: int, size: int) -> list[str]:
    deit, *ours = (
        benchmark(f"Ti geometry, {size} px, batch {batch_size}")[label]
        for label in ("DeiT-Ti", "Famba-V-Ti none", "Famba-V-Ti upper")
    )
    return [title, both_times(deit), *(f"{both_times(record)} ({both_ratios(record, deit)})" for record in ours)]


def test_the_speed_in_the_readme_is_what_was_measured():
    rows = [sizes_row(f"{images} of {size} px", images, size) for images, size in ((8, 224), *((1, s) for s in SIZES))]
    header = "| images | DeiT-Ti | Famba-V-Ti, no fusion | Famba-V-Ti, upper fusion |"
    assert tables(README)[header] == rows


def test_the_speed_over_sizes_is_what_was_measured():
    header = "| one image | DeiT-Ti forward, step, ms | Famba-V-Ti, no fusion | upper | upper, `fusion_window=128` |"
    rows = []
    for size in SIZES:
        records = benchmark(f"Ti geometry, {size} px, batch 1")
        deit, windowed = records["DeiT-Ti"], records["Famba-V-Ti upper window=128"]
        rows.append([*sizes_row(f"{size} px", 1, size), f"{both_times(windowed)} ({both_ratios(windowed, deit)})"])
    assert tables(MODEL_CARDS)[header] == rows


def test_the_speed_over_strategies_is_what_was_measured():
    rows = []
    for title in (f"{geometry}, 224 px, batch 8" for geometry in ("Ti geometry", "S geometry")):
        rows += _strategy_rows(benchmark(title), "")
    rows += _strategy_rows(benchmark("Ti geometry, 224 px, batch 8, bf16"), " bf16")
    header = (
        "| batch 8, 224 px | tokens per layer | forward, ms (of DeiT) | training step, ms (of DeiT) | memory, MiB | "
        "time saved (forward, step) of what the tokens allow |"
    )
    assert tables(MODEL_CARDS)[header] == rows


def _strategy_rows(records: dict[str, dict[str, Any]], suffix: str) -> Rows:
    deit = next(record for record in records.values() if record["family"] == "deit")
    unfused = next(r for r in records.values() if r["family"] == "famba-v" and r["strategy"] == "none")
    rows = []
    for label, record in records.items():
        row = [label + suffix, f"{record['mean_tokens']:.1f}"]
        for name in ("forward_seconds", "step_seconds"):
            row.append(f"{1000 * record[name]:.0f} ({record[name] / deit[name]:.2f})")
        row.append(f"{record['step_peak_bytes'] / 2**20:.0f}")
        row.append("" if record["strategy"] == "none" else f"{_saved(record, unfused)}")
        rows.append(row)
    return rows


def _saved(record: dict[str, Any], unfused: dict[str, Any]) -> str:
    forward, step, tokens = (
        f"{1 - record[name] / unfused[name]:.0%}" for name in ("forward_seconds", "step_seconds", "mean_tokens")
    )
    return f"{forward}, {step} of {tokens}"


def test_the_speed_with_narrower_vectors_is_what_was_measured():
    report = read_json("benchmarks", "cpu_2_cores_avx2", "benchmark.json")
    deit, *ours = report["results"]["Ti geometry, 224 px, batch 8"]
    (forward, step), (fused_forward, fused_step) = (both_ratios(record, deit).split(", ") for record in ours)
    sentence = (
        f"forward {forward} times as long as DeiT-Ti without fusion and {fused_forward} with upper fusion, "
        f"a training step {step} and {fused_step}"
    )
    assert sentence in " ".join(MODEL_CARDS.read_text(encoding="utf-8").split())


def test_the_core_operations_are_what_was_measured():
    seconds = read_json("benchmarks", "cpu_2_cores", "benchmark.json")["core_operations"]
    forward, products, scans = (1000 * seconds[name] for name in ("forward", "matrix products", "scans"))
    sentence = (
        f"A forward pass without fusion takes {forward:.0f} ms, its matrix products alone {products:.0f} ms, its "
        f"scans alone {scans:.0f} ms: {forward / (products + scans):.2f} times the sum of the two."
    )
    assert sentence in " ".join(MODEL_CARDS.read_text(encoding="utf-8").split())


def test_the_demo_is_what_was_measured():
    results = {strategy: read_json("benchmarks", "demo", f"{strategy}.json") for strategy in demo.STRATEGIES}
    printed = (MEASURED / "benchmarks" / "demo" / "demo.txt").read_text(encoding="utf-8")
    assert printed.startswith(f"{demo.report(results)}\n")
    assert f"```\n{printed}```" in README.read_text(encoding="utf-8")


def test_the_headline_is_what_was_measured():
    """Of Vim-Ti with upper fusion, and of the checkpoint whose picture the README shows."""
    text = " ".join(README.read_text(encoding="utf-8").split())
    records = benchmark("Ti geometry, 224 px, batch 8")
    upper, none = (records[f"Famba-V-Ti {name}"]["step_seconds"] for name in ("upper", "none"))
    large = benchmark("Ti geometry, 1024 px, batch 1")
    fused, unfused = (
        large[f"Famba-V-Ti {name}"]["step_seconds"] / large["DeiT-Ti"]["step_seconds"] for name in ("upper", "none")
    )
    assert f"a training step of Vim-Ti takes {1 - upper / none:.0%} less time".replace("%", " %") in text
    memory = [records[f"Famba-V-Ti {name}"]["step_peak_bytes"] for name in ("upper", "none")]
    assert 0.28 < 1 - memory[0] / memory[1] < 0.38 and "and about a third less memory with fusion" in text
    assert f"It is then {upper / records['DeiT-Ti']['step_seconds']:.2f} times as long as one of DeiT-Ti" in text
    at_1024_px = f"at 1024 px a fused step takes {fused:.2f} times as long as one of DeiT-Ti"
    assert f"{at_1024_px} ({unfused:.2f} without fusion)" in text

    (checkpoint,) = set(re.findall(r"model_cards/([\w-]+)/\w+_fusion\.png", text))
    results = read_json(checkpoint, "all_results.json")
    megabytes = (MEASURED / checkpoint / "model.safetensors").stat().st_size / 1e6
    seconds = round(results["train_seconds"])
    assert f"{megabytes:.1f} MB, {results['top1']:.2f} % top-1, trained in {seconds} s on that GPU" in " ".join(
        text.split()
    )
    assert f"Of {results['sequence_lengths'][0]} tokens, {results['sequence_lengths'][-1]} remain." in text


def test_gpu_tables_are_what_was_measured():
    pages = tables(MODEL_CARDS)
    (scan,) = read_json("benchmarks", "h200", "kernel_speed.json")["cells"].values()
    names = {"ours (Triton)": "triton", "mamba-ssm": "mamba-ssm", "plain torch": "torch"}
    for name, *shown in pages["| | forward, ms | with gradients, ms |"]:
        for text, kind in zip(shown, ("forward_ms", "forward_backward_ms"), strict=True):
            value, ours = scan[names[name]][kind], scan["triton"][kind]
            assert text == f"{value:.2f} ({value / ours:.1f})"
            if name == "mamba-ssm":
                kind = "forward as mamba-ssm's" if kind == "forward_ms" else "with gradients"
                assert re.search(rf"{value / ours:.1f} times( as fast)?\s{kind}", README.read_text(encoding="utf-8"))

    header = "| model | scan | forward, ms (of DeiT) | training step, ms (of DeiT) | peak memory of a step, MiB |"
    measured = read_json("benchmarks", "h200", "model_speed.json")["cells"]
    records = {record["label"]: record for record in measured["Ti geometry, 224 px, batch 128, bf16"]["records"]}
    deit = records["DeiT-Ti"]
    for name, backend, *shown in pages[header]:
        label = name if name == "DeiT-Ti" else f"Famba-V-Ti {name} {'triton' if backend == 'ours' else backend}"
        record = records.pop(label)
        seconds = [(record[kind], deit[kind]) for kind in ("forward_seconds", "step_seconds")]
        expected = [f"{1e3 * value:.1f} ({value / other:.2f})" for value, other in seconds]
        assert shown == [*expected, f"{record['step_peak_bytes'] / 2**20:.0f}"]
    assert not records


def test_the_answer_in_the_readme_is_that_of_the_checkpoint():
    text = README.read_text(encoding="utf-8")
    (folder,) = re.findall(r'^folder = "model_cards/([\w-]+)"$', text, re.MULTILINE)
    (image,) = re.findall(r"examples/([\w.]+)\"", text)
    answers = read_json(folder, "examples", "answers.json")[image]
    shown = "\n".join(f"{answer['label']}: {answer['score']:.1%}" for answer in answers)
    assert f"```\n{shown}\n```" in text


def test_every_checkpoint_in_the_index_is_as_it_was_scored():
    index = tables(MODEL_CARDS)["| folder | data | top-1, % | top-5, % | parameters | trained |"]
    assert {re.match(r"\[([\w-]+)\]", row[0]).group(1) for row in index} == {
        path.parent.name for path in MEASURED.glob("*/model.safetensors")
    }
    for row in index:
        results = read_json(re.match(r"\[([\w-]+)\]", row[0]).group(1), "all_results.json")
        assert row[2:4] == [f"{results['top1']:.2f}", f"{results['top5']:.2f}"]
        assert row[4].startswith(f"{results['num_parameters'] / 1e6:.1f} million")


def test_levers_are_as_they_were_scored():
    runs = read_json("tables", "levers", "levers.json")
    rows = tables(MODEL_CARDS)["| | top-1, % | processor time, s |"]
    assert [row[1:] for row in rows] == [
        [f"{run['top1']:.2f}", f"{run['processor_seconds']:.0f}"] for run in runs.values()
    ]
    text, base = " ".join(MODEL_CARDS.read_text(encoding="utf-8").split()), runs["base_0"]["top1"]
    gains = [base - runs[f"{name}_0"]["top1"] for name in ("labels", "adamw", "kl", "no_stem")]
    shown = "the teacher is worth {:.1f} points, Muon {:.1f}, standardized logits {:.1f} and the stem {:.1f}"
    assert shown.format(*gains) in text
    middle, temperature = (runs[f"{name}_0"]["top1"] - base for name in ("middle", "temperature_4"))
    assert f"brings {middle:.1f}**, and a temperature of 4 instead of 2 brings {temperature:.1f}" in text
    assert runs["none_0"]["top1"] < base
    assert all(abs(run["ema_top1"] - run["top1"]) < 0.4 for run in runs.values())


def test_earlier_releases_are_as_they_were_scored():
    text = " ".join(MODEL_CARDS.read_text(encoding="utf-8").split())
    runs = {name: read_json("tables", "earlier_release", f"{name}.json") for name in ("first", "second", "third")}
    accuracies, minutes = zip(*((f"{run['top1']:.2f} %", round(run["train_seconds"] / 60)) for run in runs.values()))
    assert f"17 epochs ended with {accuracies[0]} after {minutes[0]} minutes" in text
    assert f"22 more with {accuracies[1]} after {minutes[1]}" in text
    assert f"the same again with {accuracies[2]} after {minutes[2]}" in text
    fused, unfused = runs["third"], read_json("tables", "earlier_release", "third_unfused.json")
    saved, cost = 1 - fused["train_seconds"] / unfused["train_seconds"], unfused["top1"] - fused["top1"]
    assert f"{unfused['top1']:.2f} % after {unfused['train_seconds']:.0f} s" in text
    assert f"saved {saved:.0%} of the time".replace("%", " %") in text and f"cost {cost:.1f} point" in text


@pytest.mark.parametrize("folder", sorted(path.parent for path in MEASURED.glob("*/README.md")), ids=lambda p: p.name)
def test_a_card_names_the_data_that_its_model_was_scored_on(folder):
    card = ModelCard.load(folder / "README.md").data
    (result,) = {(each.dataset_type, each.dataset_split) for each in card.eval_results}
    assert card.datasets == [result[0]] == ["uoft-cs/cifar100"] and result[1] == "test"


def test_what_fusion_costs_on_a_gpu():
    cell = read_json("benchmarks", "h200", "model_speed.json")["cells"]["Ti geometry, 224 px, batch 128, bf16"]
    records = {record["label"].removeprefix("Famba-V-Ti "): record for record in cell["records"]}
    none, upper = records["none triton"], records["upper triton"]
    slower = [
        records[f"{name} triton"]["step_seconds"] / none["step_seconds"] - 1
        for name in ("all", "interleaved", "lower", "upper")
    ]
    memory = [
        1 - upper["step_peak_bytes"] / records[name]["step_peak_bytes"] for name in ("none triton", "none mamba-ssm")
    ]
    readme, page = (" ".join(path.read_text(encoding="utf-8").split()) for path in (README, MODEL_CARDS))
    assert f"takes {memory[0]:.0%} less memory".replace("%", " %") in readme
    assert f"{upper['step_seconds'] / none['step_seconds'] - 1:.0%} more time".replace("%", " %") in readme
    assert f"{100 * min(slower):.0f} to {100 * max(slower):.0f} % of a step" in page
    assert f"{memory[0]:.0%} less memory than none, and {memory[1]:.0%} less".replace("%", " %") in page
    assert f"take {1e3 * none['step_seconds'] / 24:.1f} ms" in page


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = _LINK.findall(_CODE_BLOCK.sub("", page.read_text(encoding="utf-8")))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page_name(page)}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page_name(page)}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_scripts_in_commands_exist(page):
    scripts = re.findall(r"(?<![\w/])training/[a-z_\d/]+\.(?:py|yaml|ipynb)\b", page.read_text(encoding="utf-8"))
    for script in scripts:
        assert (REPOSITORY / script).exists(), f"{script} in {page_name(page)}"


def test_the_first_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_a_space_needs_what_the_scripts_need():
    """The requirements.txt of the page on a Space has the bounds of pyproject.toml."""
    page = (REPOSITORY / "training" / "README.md").read_text(encoding="utf-8")
    wanted = re.search(r"`requirements.txt`.*?```\n(.*?)```", page, re.DOTALL)
    assert wanted is not None
    bounds = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert [line for line in wanted[1].split() if f'"{line}"' not in bounds] == []
