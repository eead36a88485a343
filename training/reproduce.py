"""Run a table of the paper, and write what comes out beside what the paper reports.

    python training/reproduce.py --table 1 --scale nano --dataset_name ../shared/cifar100

Every cell of the table and every seed is a training run of its own. A table that was interrupted goes on where it was
when the same command is given again; runs that are finished are only read. All that is left is in one folder:

    OUTPUT_DIR/table1_nano/
        upper_seed0/             what train.py leaves
        upper_seed0.train.log    what it printed
        table.json, table.md, table.png

Scales: `paper` (224 px, 24 layers, 300 epochs), `native32` (the same model on 32 px), `nano` (a small model on 32 px,
for a laptop) and `quick` (seconds; says nothing about accuracy). At all of them a strategy removes the same share of
the tokens as in the paper.
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from arguments import parse_arguments
from budgets import coinciding_layers, fusion_fields
from modeling_fambav import FambaVConfig
from saving import RESULTS_FILE
from tables import markdown_table
from training_arguments import TrainingArguments, binding_arguments

NOT_RUN = "not run"
_LOG_TAIL_LINES = 15

# ---- scales ----

_CIFAR100 = {
    "dataset_name": "uoft-cs/cifar100",
    "image_column_name": "img",
    "label_column_name": "fine_label",
    # Scored once, after the last epoch; nothing is chosen by it
    "validation_split": "test",
}
_PAPER_RECIPE = {
    "num_train_epochs": 300,
    "per_device_train_batch_size": 128,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup_ratio": 0.02,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.8,
    "random_erasing_prob": 0.25,
    "ema_decay": 0.9999,
}
_VIM_TI = {"hidden_size": 192, "num_hidden_layers": 24, "state_size": 16}
_PATCHES_OF_32_PX = {"image_size": 32, "patch_size": 4}

SCALES: dict[str, dict[str, Any]] = {
    "paper": {
        **_CIFAR100,
        **_PAPER_RECIPE,
        **_VIM_TI,
        "image_size": 224,
        "patch_size": 16,
        "dataloader_num_workers": 8,
    },
    "native32": {**_CIFAR100, **_PAPER_RECIPE, **_VIM_TI, **_PATCHES_OF_32_PX},
    "nano": {
        **_CIFAR100,
        **_PAPER_RECIPE,
        **_PATCHES_OF_32_PX,
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "state_size": 8,
        # In a few epochs a small model underfits, so images are not mixed or erased, and the average is short.
        "num_train_epochs": 15,
        "warmup_ratio": 0.05,
        "mixup_alpha": 0.0,
        "random_erasing_prob": 0.0,
        "ema_decay": 0.999,
    },
    "quick": {
        "dataset_name": "digits",
        "max_train_samples": 256,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 64,
        "learning_rate": 0.01,
        "mixup_alpha": 0.0,
        "random_erasing_prob": 0.0,
        "ema_decay": 0.5,
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "state_size": 4,
    },
}
# Vim-S is Vim-Ti at twice the width.
_WIDTH_FACTORS = {"ti": 1, "s": 2}


def geometry(flags: dict[str, Any]) -> dict[str, int]:
    """Those flags that say how many layers and tokens there are."""
    return {name: flags[name] for name in ("image_size", "patch_size", "num_hidden_layers")}


# ---- the paper's tables ----


@dataclass(frozen=True)
class PaperResult:
    """A row of a table of the paper, measured at 224 px on an A100.

    Attributes:
        top1, top5: accuracy on CIFAR-100 in percent.
        training_time: of 300 epochs, h:mm:ss.
        peak_memory: as printed; the paper gives no unit.
    """

    top1: float
    top5: float
    training_time: str
    peak_memory: int

    @property
    def train_seconds(self) -> int:
        hours, minutes, seconds = map(int, self.training_time.split(":"))
        return 3600 * hours + 60 * minutes + seconds


TABLE_1 = {
    "ti": {
        "none": PaperResult(70.1, 90.6, "4:33:02", 8302),
        "all": PaperResult(61.9, 85.6, "4:06:45", 5499),
        "interleaved": PaperResult(67.0, 89.3, "3:59:21", 5354),
        "lower": PaperResult(62.2, 86.1, "3:55:56", 4741),
        "upper": PaperResult(70.5, 90.5, "4:08:40", 5996),
    },
    "s": {
        "none": PaperResult(76.9, 93.6, "7:46:16", 16439),
        "all": PaperResult(68.9, 89.3, "6:01:16", 10657),
        "interleaved": PaperResult(72.8, 91.2, "5:56:15", 10400),
        "lower": PaperResult(69.0, 89.0, "5:34:36", 9139),
        "upper": PaperResult(75.2, 92.0, "6:19:28", 12161),
    },
}
# Tokens per fused layer
TABLE_1_TOKENS = {"all": 7, "interleaved": 14, "lower": 9, "upper": 9}
# By starting layer, counted from 1: tokens per fused layer, result
TABLE_2 = {
    15: (15, PaperResult(72.7, 92.2, "4:22:04", 7185)),
    14: (14, PaperResult(73.6, 92.2, "4:20:34", 7049)),
    13: (13, PaperResult(72.7, 92.2, "4:19:23", 6936)),
    12: (12, PaperResult(72.3, 92.0, "4:15:32", 6828)),
    11: (12, PaperResult(72.0, 91.6, "4:14:33", 6574)),
    10: (11, PaperResult(71.9, 91.5, "4:12:54", 6496)),
    9: (10, PaperResult(71.7, 91.1, "4:12:35", 6498)),
    8: (10, PaperResult(70.6, 90.9, "4:10:20", 6237)),
    7: (9, PaperResult(71.0, 91.2, "4:13:21", 6258)),
    6: (9, PaperResult(70.5, 90.5, "4:08:40", 5996)),
    5: (8, PaperResult(70.5, 90.5, "4:09:31", 6071)),
    4: (8, PaperResult(69.6, 90.2, "4:11:19", 5810)),
    3: (7, PaperResult(68.1, 89.5, "4:08:11", 6007)),
    2: (7, PaperResult(66.8, 88.9, "4:16:27", 5764)),
}
# By tokens per fused layer, all from the 6th layer
TABLE_3 = {
    9: PaperResult(70.5, 90.5, "4:08:40", 5996),
    8: PaperResult(70.8, 90.4, "4:11:57", 6313),
    7: PaperResult(70.4, 90.7, "4:15:31", 6662),
    6: PaperResult(70.8, 91.2, "4:20:17", 6984),
    5: PaperResult(70.9, 91.1, "4:24:59", 7322),
    4: PaperResult(70.9, 91.2, "4:34:12", 7645),
    3: PaperResult(71.7, 91.4, "4:38:33", 7986),
    2: PaperResult(71.4, 91.6, "4:42:38", 8337),
    1: PaperResult(72.4, 91.6, "4:42:32", 8693),
}


@dataclass(frozen=True)
class Cell:
    """A row of a table.

    Attributes:
        name: for folders and `--cells`.
        title: what the paper varies.
        paper: the paper's numbers.
        fusion: fusion fields of `FambaVConfig` that are run for it at this scale.
        same_as: name of the cell that stands for this one, because both start at the same layer of this model.
    """

    name: str
    title: str
    paper: PaperResult
    fusion: dict[str, Any]
    same_as: str | None = None


def table_cells(table: int, flags: dict[str, Any], backbone: str) -> list[Cell]:
    """The rows of a table for a model of this size, the one without fusion first."""
    num_layers = flags["num_hidden_layers"]
    size = num_layers, FambaVConfig(**geometry(flags), fusion_strategy="none").num_patches + 1
    cells = [Cell("none", "no fusion", TABLE_1[backbone]["none"], {"fusion_strategy": "none"})]
    if table == 1:
        for strategy, tokens in TABLE_1_TOKENS.items():
            fusion = fusion_fields(strategy, tokens, *size)
            cells.append(Cell(strategy, strategy, TABLE_1[backbone][strategy], fusion))
    elif table == 2:
        same_as = coinciding_layers([start - 1 for start in TABLE_2], num_layers)
        for start, (tokens, paper) in TABLE_2.items():
            run_start = same_as[start - 1] + 1
            fusion = fusion_fields("upper", TABLE_2[run_start][0], *size, start_layer=run_start - 1)
            title = f"upper, {tokens} from layer {start}"
            stand_in = None if run_start == start else f"start{run_start}"
            cells.append(Cell(f"start{start}", title, paper, fusion, stand_in))
    else:
        for tokens, paper in TABLE_3.items():
            fusion = fusion_fields("upper", tokens, *size)
            cells.append(Cell(f"r{tokens}", f"upper, {tokens} from layer 6", paper, fusion))
    return cells


# ---- runs ----


@dataclass(frozen=True)
class Run:
    """A cell with a seed: one training run.

    Attributes:
        cell: name of the cell.
        seed: seed of the run.
        folder: where train.py leaves what it makes.
        flags: flags of train.py.
    """

    cell: str
    seed: int
    folder: Path
    flags: dict[str, Any]

    @property
    def log(self) -> Path:
        """Beside the folder: train.py refuses one that holds files of others."""
        return self.folder.with_name(f"{self.folder.name}.train.log")

    @property
    def words(self) -> list[str]:
        """The flags as words of a command line; a list becomes several."""
        words = []
        for name, value in self.flags.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    @property
    def command(self) -> list[str]:
        """The run as a process."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
        launch += [f"--mixed_precision={self.flags['mixed_precision']}", "--dynamo_backend=no"]
        return [*launch, str(Path(__file__).parent / "train.py"), *self.words]

    def results(self) -> dict[str, Any] | None:
        """What the finished run reports, or None if it is not finished.

        Raises:
            ValueError: if it was trained with other flags than this run's.
        """
        path = self.folder / RESULTS_FILE
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        args, overrides = parse_arguments(TrainingArguments, "", self.words)
        expected = binding_arguments(args, overrides)
        # Flags that are not binding may differ; fields of the model that only the other run was given may not.
        free = {field.name for field in dataclasses.fields(args)} - expected.keys()
        found = {name: value for name, value in results["arguments"].items() if name not in free}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{path}: trained with --{name} {found.get(name)}, expected {expected.get(name)}, that of this "
                    "call; give another --output_dir, or delete that folder"
                )
        return results


def table_runs(cells: list[Cell], seeds: Iterable[int], flags: dict[str, Any], folder: Path) -> dict[str, list[Run]]:
    """The runs of every cell, one per seed. Cells that another one stands for have none."""
    runs = {}
    for cell in cells:
        runs[cell.name] = []
        for seed in seeds if cell.same_as is None else ():
            run_folder = folder / f"{cell.name}_seed{seed}"
            ours = {"seed": seed, "output_dir": run_folder, "checkpointing_steps": "epoch"}
            resume = {"checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
            run_flags = {**flags, **cell.fusion, **ours, **resume}
            runs[cell.name].append(Run(cell.name, seed, run_folder, run_flags))
    return runs


def launch(run: Run) -> int:
    """Run a cell in a process of its own, whose time and memory are its own. Returns the exit code."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as log:
        log.write(f"$ {shlex.join(run.command)}\n")
        log.flush()
        process = subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Threads that wait without spinning, which costs nothing here and much on a machine that is busy
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            # To the launcher and to train.py, which saves a checkpoint before it leaves
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def log_tail(run: Run) -> str:
    """The last lines that a run printed."""
    # A progress bar goes back to the start of its line instead of beginning a new one.
    lines = run.log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])


# ---- reports ----

# Measures that train.py reports
_REPORTED = ("top1", "top5", "ema_top1", "train_seconds", "peak_memory_bytes")


def summarize(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]] | None:
    """Mean and standard deviation (n - 1; None for a single seed) of every measure; None without any result."""
    if not results:
        return None
    values = {name: [result[name] for result in results] for name in _REPORTED}
    # On a CPU the peak includes the interpreter and its libraries.
    values["training_memory_bytes"] = [r["peak_memory_bytes"] - r["start_memory_bytes"] for r in results]
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
            command = shlex.join(run.command)
            run_records.append({"seed": run.seed, "folder": str(run.folder), "command": command, "results": results})
            if results is not None:
                finished.append(results)
                condition = {name: results[name] for name in ("device", "scan_backend", "versions", "git_commit")}
                if condition not in conditions:
                    conditions.append(condition)
        config = FambaVConfig(**geometry(flags), **cell.fusion)
        records.append(
            {
                "cell": cell.name,
                "title": cell.title,
                "same_as": cell.same_as,
                "fusion": cell.fusion,
                "tokens_removed": config.tokens_removed,
                "sequence_lengths": config.sequence_lengths,
                "paper": {**dataclasses.asdict(cell.paper), "train_seconds": cell.paper.train_seconds},
                "seeds_finished": len(finished),
                "measured": summarize(finished),
                "runs": run_records,
            }
        )
    for record in records:
        record["saved"] = _savings(record, records[0])
    return {"conditions": conditions, "cells": records}


def _savings(record: dict[str, Any], none: dict[str, Any]) -> dict[str, float | None]:
    """Shares of what the cell without fusion takes; the tokens are the limit for the time."""

    def saved(value: float, of: float) -> float:
        return 1 - value / of

    savings = {
        "tokens": saved(sum(record["sequence_lengths"]), sum(none["sequence_lengths"])),
        "paper_time": saved(record["paper"]["train_seconds"], none["paper"]["train_seconds"]),
        "paper_memory": saved(record["paper"]["peak_memory"], none["paper"]["peak_memory"]),
        "time": None,
        "memory": None,
    }
    ours, reference = record["measured"], none["measured"]
    if ours is not None and reference is not None:
        for name, measure in (("time", "train_seconds"), ("memory", "peak_memory_bytes")):
            savings[name] = saved(ours[measure]["mean"], reference[measure]["mean"])
    return savings


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
    text += [
        "Columns of the paper are its numbers, measured at 224 px on an A100 over 300 epochs; it gives no unit of "
        "memory. Ours are means over seeds, ± the standard deviation where there are several.\n",
        markdown_table([_result_row(record) for record in records]),
        "\n### Saved of the time and memory without fusion\n",
        "The limit is the share of tokens that the layers do not see.\n",
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
    return {
        "cell": record["title"],
        "seeds": f"{record['seeds_finished']} of {len(record['runs'])}" if record["same_as"] is None else "",
        "top-1, %": _measured(record, "top1", "{:.2f}".format),
        "top-1, paper": f"{paper['top1']}",
        "top-5, %": _measured(record, "top5", "{:.2f}".format),
        "top-5, paper": f"{paper['top5']}",
        "top-1 of averaged weights, %": _measured(record, "ema_top1", "{:.2f}".format),
        "training time": _measured(record, "train_seconds", duration),
        "time, paper": paper["training_time"],
        "peak memory, MiB": _measured(record, "peak_memory_bytes", _mebibytes),
        "of it for training": _measured(record, "training_memory_bytes", _mebibytes),
        "memory, paper": f"{paper['peak_memory']}",
    }


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

    return {
        "cell": record["title"],
        "time": ours("time"),
        "limit": f"{saved['tokens']:.1%}" if record["same_as"] is None else "",
        "time, paper": f"{saved['paper_time']:.1%}",
        "memory": ours("memory"),
        "memory, paper": f"{saved['paper_memory']:.1%}",
    }


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
    """Accuracy against training time and against peak memory, a point per cell, bars over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    quantities = {"train_seconds": ("training time, s", 1), "peak_memory_bytes": ("peak memory, MiB", 2**20)}
    for axis, (name, (label, unit)) in zip(axes, quantities.items()):
        for record in report["cells"]:
            if record["measured"] is None:
                continue
            cost, accuracy = record["measured"][name], record["measured"]["top1"]
            bars = {}
            if cost["std"] is not None:
                bars = {"xerr": cost["std"] / unit, "yerr": accuracy["std"], "capsize": 2}
            color = "tab:gray" if record["cell"] == "none" else "tab:orange"
            point = cost["mean"] / unit, accuracy["mean"]
            axis.errorbar(*point, fmt="o", color=color, **bars)
            axis.annotate(record["cell"], point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="top-1, %")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(title: str, report: dict[str, Any], folder: Path) -> None:
    """Write table.json, table.md and table.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps({"title": title, **report}, indent=1, allow_nan=False) + "\n")
    (folder / "table.md").write_text(markdown(title, report))
    plot(title, report, folder / "table.png")


# ---- the command ----


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=int, choices=(1, 2, 3), required=True, help="table of the paper")
    parser.add_argument("--scale", choices=SCALES, default="nano", help="size of images, model and run")
    parser.add_argument("--backbone", choices=_WIDTH_FACTORS, default="ti", help="Vim-Ti or Vim-S, twice as wide")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="runs per cell, with seeds 0 to K-1")
    parser.add_argument("--dataset_name", help="Hub id or local folder instead of the scale's own dataset")
    parser.add_argument("--epochs", type=int, help="epochs per run instead of the scale's own")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="run only these; the others keep what they have")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of all runs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"), help="folder of all tables")
    args = parser.parse_args(argv)
    if args.backbone == "s" and args.table != 1:
        parser.error("--backbone s: only table 1 has Vim-S")
    for name in ("seeds", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    return args


def shared_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of train.py that all runs of a table have."""
    flags = {**SCALES[args.scale], "mixed_precision": args.mixed_precision}
    flags["hidden_size"] *= _WIDTH_FACTORS[args.backbone]
    if args.dataset_name is not None:
        flags["dataset_name"] = args.dataset_name
    if args.epochs is not None:
        flags["num_train_epochs"] = args.epochs
    return flags


def choose_runs(cells: list[Cell], runs: dict[str, list[Run]], names: list[str] | None) -> list[Run]:
    """Runs of these cells, of all cells if None, seed by seed so that the table fills early.

    Raises:
        ValueError: if a name is not that of a cell.
    """
    stand_ins = {cell.name: cell.same_as or cell.name for cell in cells}
    unknown = sorted(set(names or ()) - stand_ins.keys())
    if unknown:
        raise ValueError(f"--cells {' '.join(unknown)}: expected some of {' '.join(stand_ins)}")
    chosen = {stand_ins[name] for name in names or stand_ins}
    return sorted((run for name in runs if name in chosen for run in runs[name]), key=lambda run: run.seed)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    name = f"table{args.table}_{args.scale}" + ("_s" if args.backbone == "s" else "")
    title = f"Table {args.table}, Vim-{args.backbone.capitalize()}, scale {args.scale}"
    folder, flags = args.output_dir / name, shared_flags(args)
    cells = table_cells(args.table, flags, args.backbone)
    runs = table_runs(cells, range(args.seeds), flags, folder)
    failed = []
    try:
        chosen = choose_runs(cells, runs, args.cells)
        write_report(title, make_report(cells, runs, flags), folder)
        for number, run in enumerate(chosen, 1):
            progress = f"[{number}/{len(chosen)}] {run.folder}"
            if run.results() is not None:
                print(f"{progress}: finished before", flush=True)
                continue
            print(f"{progress}: training, see {run.log}", flush=True)
            exit_code = launch(run)
            results = run.results()
            if exit_code != 0 or results is None:
                failed.append(run)
                print(f"{progress}: FAILED with exit code {exit_code}; {run.log} ends with", flush=True)
                print(log_tail(run), flush=True)
                continue
            print(f"{progress}: top-1 {results['top1']:.2f} %, {duration(results['train_seconds'])}", flush=True)
            write_report(title, make_report(cells, runs, flags), folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where this was")
    print(f"\n{(folder / 'table.md').read_text()}")
    print(f"{folder}: table.json, table.md, table.png")
    if failed:
        sys.exit(f"{len(failed)} of {len(chosen)} runs failed: {', '.join(str(run.folder) for run in failed)}")


if __name__ == "__main__":
    main()
