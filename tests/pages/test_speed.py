"""Times and memory on the pages are those of the benchmarks."""

import re
from typing import Any

import demo
from support.pages import MEASURED, MODEL_CARDS, README, Rows, read_json, sentences, tables


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
    assert sentence in sentences(MODEL_CARDS)


def test_the_core_operations_are_what_was_measured():
    seconds = read_json("benchmarks", "cpu_2_cores", "benchmark.json")["core_operations"]
    forward, products, scans = (1000 * seconds[name] for name in ("forward", "matrix products", "scans"))
    sentence = (
        f"A forward pass without fusion takes {forward:.0f} ms, its matrix products alone {products:.0f} ms, its "
        f"scans alone {scans:.0f} ms: {forward / (products + scans):.2f} times the sum of the two."
    )
    assert sentence in sentences(MODEL_CARDS)


def test_the_demo_is_what_was_measured():
    results = {strategy: read_json("benchmarks", "demo", f"{strategy}.json") for strategy in demo.STRATEGIES}
    printed = (MEASURED / "benchmarks" / "demo" / "demo.txt").read_text(encoding="utf-8")
    assert printed.startswith(f"{demo.report(results)}\n")
    assert f"```\n{printed}```" in README.read_text(encoding="utf-8")


def test_the_headline_is_what_was_measured():
    """Of Vim-Ti with upper fusion, and of the checkpoint whose picture the README shows."""
    text = sentences(README)
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
    seconds = read_json("tables", "earlier_release", "fourth.json")["train_seconds"]  # which it began with
    trained = f"trained for {seconds:.0f} s on that GPU and {results['train_seconds'] / 60:.0f} min on two CPU cores"
    twin = read_json(checkpoint, "without_fusion.json")
    cost, share = twin["top1"] - results["top1"], results["processor_seconds"] / twin["processor_seconds"]
    beside = f"({cost:.1f} points below its twin without fusion, in {share:.0%} of the processor time)".replace(
        "%", " %"
    )
    assert f"{megabytes:.1f} MB, {results['top1']:.2f} % top-1 {beside}, {trained}" in text
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
    readme, page = (sentences(path) for path in (README, MODEL_CARDS))
    assert f"takes {memory[0]:.0%} less memory".replace("%", " %") in readme
    assert f"{upper['step_seconds'] / none['step_seconds'] - 1:.0%} more time".replace("%", " %") in readme
    assert f"{100 * min(slower):.0f} to {100 * max(slower):.0f} % of a step" in page
    assert f"{memory[0]:.0%} less memory than none, and {memory[1]:.0%} less".replace("%", " %") in page
    assert f"take {1e3 * none['step_seconds'] / 24:.1f} ms" in page
