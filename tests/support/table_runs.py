"""Tables of the paper whose runs are stand-ins that take no time."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import reproduce
from fambav_training.cli import parse_arguments
from fambav_training.paper.runs import Run
from fambav_training.run.arguments import TrainingArguments
from modeling_fambav import FambaVConfig

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
MEASURED = {
    "none": (50.0, 100.0, 1000),
    "all": (40.0, 80.0, 700),
    "interleaved": (44.0, 75.0, 650),
    "lower": (42.0, 60.0, 600),
    "upper": (49.0, 70.0, 800),
}


def hand_made_results(run: Run, **changes: Any) -> dict[str, Any]:
    """What train.py would write, with numbers from `MEASURED`; each seed adds one point of accuracy."""
    args, overrides = parse_arguments(TrainingArguments, "", run.words)
    top1, seconds, mebibytes = MEASURED.get(run.cell, (30.0, 90.0, 900))
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


def stand_in(run: Run, fails: bool) -> list[str]:
    """A command in place of the run's: it prints, and leaves results or fails."""
    if fails:
        return [sys.executable, "-c", _FAIL]
    return [sys.executable, "-c", _WRITE_RESULTS, str(run.folder), json.dumps(hand_made_results(run))]


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
