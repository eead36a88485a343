"""The report of a reproduced table: JSON, Markdown and a plot, ours beside the paper's."""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from fambav_training.fusion.multiply_adds import multiply_adds
from fambav_training.markdown import markdown_table
from fambav_training.paper.runs import REPORTED, Run
from fambav_training.paper.tables import Cell, model_fields
from fambav_training.plots import plot_to
from modeling_fambav import FambaVConfig

NOT_RUN = "not run"


def summarize(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]] | None:
    """Mean and standard deviation (n - 1; None for a single seed) of every measure; None without any result."""
    if not results:
        return None
    values = {name: [result[name] for result in results] for name in REPORTED if name != "start_memory_bytes"}
    values["training_memory_bytes"] = [_training_memory(result) for result in results]
    return {
        name: {"mean": statistics.mean(ours), "std": statistics.stdev(ours) if len(ours) > 1 else None}
        for name, ours in values.items()
    }


def make_report(cells: list[Cell], runs: dict[str, list[Run]], flags: dict[str, Any]) -> dict[str, Any]:
    """All that is known of a table so far.

    Args:
        cells: rows of the table.
        runs: their runs, finished or not.
        flags: flags that all runs share.

    Returns:
        what is written to table.json. What was not measured is None.

    Raises:
        ValueError: if a finished run has other flags than this table's.
    """
    records, conditions = [], []
    for cell in cells:
        finished, run_records = [], []
        for run in runs[cell.name]:
            results = run.results()
            command = shlex.join(["python", "training/train.py", *run.words])  # as anybody can repeat it
            run_records.append({"seed": run.seed, "folder": str(run.source), "command": command, "results": results})
            if results is not None:
                finished.append(results)
                condition = {name: results[name] for name in ("device", "scan_backend", "versions", "git_commit")}
                if results["arguments"].get("cuda_graphs"):
                    condition["cuda_graphs"] = True
                if condition not in conditions:
                    conditions.append(condition)
        config = FambaVConfig(**{**model_fields(flags), **cell.fields})
        records.append(
            {
                "cell": cell.name,
                "title": cell.title,
                "same_as": cell.same_as,
                "fields": cell.fields,
                "multiply_adds": multiply_adds(config),
                "tokens_removed": config.tokens_removed,
                "sequence_lengths": config.sequence_lengths,
                "paper": cell.paper and {**dataclasses.asdict(cell.paper), "train_seconds": cell.paper.train_seconds},
                "seeds_finished": len(finished),
                "measured": summarize(finished),
                "runs": run_records,
            }
        )
    # A CPU does other work too: the time that the run itself took of it is what compares
    on_cpu = any(condition["device"].startswith("cpu") for condition in conditions)
    time_measure = "processor_seconds" if on_cpu else "train_seconds"
    for record in records:
        record["saved"] = _savings(record, records[0], time_measure)
    return {"time_measure": time_measure, "conditions": conditions, "cells": records}


def _savings(record: dict[str, Any], none: dict[str, Any], time_measure: str) -> dict[str, float | None]:
    """Shares of what the first cell takes, the one without fusion; the multiply-adds are the limit for the time."""

    def saved(value: float, of: float) -> float:
        return 1 - value / of

    savings = {
        "multiply_adds": saved(record["multiply_adds"], none["multiply_adds"]),
        "paper_time": None,
        "paper_memory": None,
        "time": None,
        "memory": None,
    }
    if record["paper"] is not None:
        for name, measure in (("paper_time", "train_seconds"), ("paper_memory", "peak_memory")):
            savings[name] = saved(record["paper"][measure], none["paper"][measure])
    # Seed by seed: another seed may have run on another machine, whose speed must not count as a saving
    ours, reference = _finished(record), _finished(none)
    if pairs := [(ours[seed], reference[seed]) for seed in ours if seed in reference]:
        savings["time"] = statistics.mean(saved(mine[time_measure], its[time_measure]) for mine, its in pairs)
        savings["memory"] = statistics.mean(
            saved(_training_memory(mine), _training_memory(its)) for mine, its in pairs
        )
    return savings


def _finished(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of the finished runs by seed."""
    return {run["seed"]: run["results"] for run in record["runs"] if run["results"] is not None}


def _training_memory(results: dict[str, Any]) -> int:
    """Bytes above what was in use before the first step: on a CPU the peak includes the interpreter and the images."""
    return results["peak_memory_bytes"] - results["start_memory_bytes"]


def markdown(title: str, report: dict[str, Any]) -> str:
    """The report for people."""
    records = report["cells"]
    text = [f"## {title}\n"]
    for condition in report["conditions"]:
        versions = ", ".join(f"{name} {version}" for name, version in condition["versions"].items())
        text.append(
            f"Measured on {condition['device']}, scan backend {condition['scan_backend']}; {versions}; "
            f"commit {condition['git_commit']}.\n"
        )
    if len(report["conditions"]) > 1:
        text.append("**Not all cells were measured under the same conditions: times and memory may not compare.**\n")
    if records[0]["paper"] is not None:
        text.append(
            "Columns of the paper are its numbers, measured at 224 px on an A100 over 300 epochs; it gives no unit of "
            "memory.\n"
        )
    time = "processor time" if report["time_measure"] == "processor_seconds" else "time"
    text += [
        "Ours are means over seeds, ± the standard deviation where there are several. Processor time is what the "
        "training process took of the cores, whatever else they did meanwhile.\n",
        markdown_table([_result_row(record) for record in records]),
        f"\n### Saved of the {time} and memory without fusion\n",
        "Each run is compared with the one of the same seed without fusion; means over the seeds that have both. The "
        "limit for the time is the share of the multiply-adds that are not computed.\n",
        markdown_table([_savings_row(record) for record in records]),
        "\n### Tokens per layer\n",
        markdown_table([_tokens_row(record) for record in records]),
        "\n### Commands\n",
        "```",
        *(run["command"] for record in records for run in record["runs"]),
        "```\n",
    ]
    return "\n".join(text)


def _result_row(record: dict[str, Any]) -> dict[str, str]:
    paper = record["paper"]
    row = {
        "cell": record["title"],
        "seeds": f"{record['seeds_finished']} of {len(record['runs'])}" if record["same_as"] is None else "",
        "top-1, %": _measured(record, "top1", "{:.2f}".format),
        "top-1, paper": paper and f"{paper['top1']}",
        "top-5, %": _measured(record, "top5", "{:.2f}".format),
        "top-5, paper": paper and f"{paper['top5']}",
        "top-1 of averaged weights, %": _measured(record, "ema_top1", "{:.2f}".format),
        "multiply-adds, M": f"{record['multiply_adds'] / 1e6:.1f}",
        "training time": _measured(record, "train_seconds", duration),
        "processor time": _measured(record, "processor_seconds", duration),
        "time, paper": paper and paper["training_time"],
        "training memory, MiB": _measured(record, "training_memory_bytes", _mebibytes),
        "memory, paper": paper and f"{paper['peak_memory']}",
    }
    return _without_missing(row)


def _without_missing(row: dict[str, str | None]) -> dict[str, str]:
    """A table that the paper does not have, has no columns of the paper."""
    return {name: text for name, text in row.items() if text is not None}


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}"


def _measured(record: dict[str, Any], name: str, to_text: Callable[[float], str]) -> str:
    if record["same_as"] is not None:
        return f"same as {record['same_as']}"
    if record["measured"] is None:
        return NOT_RUN
    measure = record["measured"][name]
    text = to_text(measure["mean"])
    return text if measure["std"] is None else f"{text} ± {to_text(measure['std'])}"


def _savings_row(record: dict[str, Any]) -> dict[str, str]:
    saved = record["saved"]

    def ours(name: str) -> str:
        if record["same_as"] is not None:
            return f"same as {record['same_as']}"
        return NOT_RUN if saved[name] is None else f"{saved[name]:.1%}"

    row = {
        "cell": record["title"],
        "time": ours("time"),
        "limit": f"{saved['multiply_adds']:.1%}" if record["same_as"] is None else "",
        "time, paper": record["paper"] and f"{saved['paper_time']:.1%}",
        "memory": ours("memory"),
        "memory, paper": record["paper"] and f"{saved['paper_memory']:.1%}",
    }
    return _without_missing(row)


def _tokens_row(record: dict[str, Any]) -> dict[str, str]:
    if record["same_as"] is not None:
        note = f"same as {record['same_as']}: both start at the same layer of this model"
        return {"cell": record["title"], "removed": "", "removed per layer": note, "tokens per layer": ""}
    return {
        "cell": record["title"],
        "removed": f"{sum(record['tokens_removed'])}",
        "removed per layer": " ".join(map(str, record["tokens_removed"])),
        "tokens per layer": " ".join(map(str, record["sequence_lengths"])),
    }


def duration(seconds: float) -> str:
    """Seconds as text, from 100 on as h:mm:ss."""
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def plot(title: str, report: dict[str, Any], path: Path) -> None:
    """Accuracy against training time as a share of that without fusion, a point per cell, bars over seeds."""
    with plot_to(path, 6, 4.2) as [axis]:
        for record in report["cells"]:
            if record["saved"]["time"] is None:
                continue
            accuracy = record["measured"]["top1"]
            bars = {} if accuracy["std"] is None else {"yerr": accuracy["std"], "capsize": 2}
            color = "tab:gray" if record["cell"] == "none" else "tab:orange"
            point = 1 - record["saved"]["time"], accuracy["mean"]
            axis.errorbar(*point, fmt="o", color=color, **bars)
            axis.annotate(record["cell"], point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        time = "processor time" if report["time_measure"] == "processor_seconds" else "training time"
        axis.set(xlabel=f"{time}, share of that without fusion", ylabel="top-1, %", title=title)


def write_report(title: str, report: dict[str, Any], folder: Path) -> None:
    """Write table.json, table.md and table.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps({"title": title, **report}, indent=1, allow_nan=False) + "\n")
    (folder / "table.md").write_text(markdown(title, report))
    plot(title, report, folder / "table.png")
