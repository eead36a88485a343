"""Steps of a measurement: each fills one JSON file cell by cell, and goes on where it was stopped."""

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fambav_training.files import atomic_file


class Cell(NamedTuple):
    """Something that is measured in at most a minute or two.

    Attributes:
        name: its key in the file.
        measure: returns what is written there, as JSON has it.
    """

    name: str
    measure: Callable[[], dict[str, Any]]


def run_step(
    path: Path, cells: Iterable[Cell], conditions: dict[str, Any], is_time_up: Callable[[], bool]
) -> dict[str, Any]:
    """Measure those cells that the file does not have yet, or that failed before.

    The file is replaced as a whole after every cell. A cell that fails is written down with its error, and the others
    go on.

    Args:
        path: the JSON file.
        cells: in the order of their value.
        conditions: device, versions and commit, which all cells of a file share.
        is_time_up: asked before every cell.

    Returns:
        the content of the file, with `is_complete`.

    Raises:
        ValueError: if the file was measured under other conditions, or cannot be read.
    """
    cells = list(cells)
    report = _read(path, conditions)
    for cell in cells:
        if "error" not in report["cells"].get(cell.name, {"error": None}):
            continue
        if is_time_up():
            break
        try:
            report["cells"][cell.name] = cell.measure()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            report["cells"][cell.name] = {"error": f"{type(error).__name__} at {where}: {error}"}
        report["is_complete"] = all("error" not in report["cells"].get(one.name, {"error": None}) for one in cells)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as new:
            new.write_text(json.dumps(report, indent=1) + "\n")
    return report


def failed_cells(report: dict[str, Any]) -> list[str]:
    """Names and errors of the cells that failed."""
    return [f"{name}: {cell['error']}" for name, cell in report["cells"].items() if "error" in cell]


def _read(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"conditions": conditions, "is_complete": False, "cells": {}}
    try:
        report = json.loads(path.read_text())
        found = report["conditions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of this script; delete it") from error
    for name, value in conditions.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path}: measured with {name} {found.get(name)!r}, now it is {value!r}; give another --output_dir"
            )
    return report
