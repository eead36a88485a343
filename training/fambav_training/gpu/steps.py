"""Steps of a measurement: each fills one JSON file cell by cell, and goes on where it was stopped."""

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fambav_training.files import atomic_file

_UNFINISHED = "the process ended while this was measured"


class Cell(NamedTuple):
    """Something that is measured in one go, in a minute or two; compiled models may take several.

    A stop in the midst of it loses what it has measured.

    Attributes:
        name: its key in the file.
        measure: returns what is written there, as JSON has it; with an `error` if a part of it failed.
    """

    name: str
    measure: Callable[[], dict[str, Any]]


class DeviceLostError(RuntimeError):
    """After a failure the device no longer answers this process, and would not answer another cell."""


class Step:
    """One JSON file and the cells that fill it.

    The file is replaced as a whole before and after every cell. A cell that fails is written down with its error and
    how often it has been tried, and so is one during which the process ends, however it does.

    Args:
        path: the JSON file.
        cells: in the order of their value.
        report: what the file holds, see `read_report`.
        git_commit: of the code that measures now; every cell has its own, so that one can be mended and done again.
    """

    def __init__(self, path: Path, cells: Iterable[Cell], report: dict[str, Any], git_commit: str | None):
        self.path, self.cells, self.report, self.git_commit = path, list(cells), report, git_commit

    def untried(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.name not in self.report["cells"]]

    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if "error" in self.report["cells"].get(cell.name, {})]

    def tries(self, cell: Cell) -> int:
        """How often a cell has failed in a row."""
        return self.report["cells"].get(cell.name, {}).get("tries", 0)

    def problems(self) -> list[str]:
        """Names and errors of the cells that failed."""
        return [f"{cell.name}: {self.report['cells'][cell.name]['error']}" for cell in self.failed()]

    def measure(self, cell: Cell, check_device: Callable[[], None]) -> None:
        """Measure one of the cells. One that fails is no error of this method.

        Args:
            cell: one of `self.cells`.
            check_device: called after a failure; raises if the device cannot be used any more.

        Raises:
            DeviceLostError: if `check_device` has raised.
        """
        tries = self.tries(cell) + 1
        self._write(cell, {"error": _UNFINISHED, "tries": tries})
        try:
            result = cell.measure()
        except Exception as error:
            result = {"error": error_text(error)}
        if "error" not in result:
            self._write(cell, result)
            return
        self._write(cell, {**result, "tries": tries})
        try:
            check_device()
        except Exception as error:
            raise DeviceLostError(f"{self.path.stem}, {cell.name}: {result['error']}") from error

    def _write(self, cell: Cell, result: dict[str, Any]) -> None:
        self.report["cells"][cell.name] = {"git_commit": self.git_commit, **result}
        self.report["is_complete"] = not self.untried() and not self.failed()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as new:
            new.write_text(json.dumps(self.report, indent=1) + "\n")


def run(steps: list[Step], is_time_up: Callable[[], bool], check_device: Callable[[], None]) -> bool:
    """Measure what the steps lack: first what has never been tried, then what had failed before, rarest first.

    So no cell that fails, slowly or with all of the device, keeps another from being measured by the next process.
    A cell that fails now is not tried again now.

    Args:
        steps: in the order of their value.
        is_time_up: asked before every cell.
        check_device: see `Step.measure`.

    Returns:
        whether the time sufficed.

    Raises:
        DeviceLostError: see `Step.measure`.
    """
    due = [(step, cell) for step in steps for cell in step.untried()]
    failed = [(step, cell) for step in steps for cell in step.failed()]
    for step, cell in due + sorted(failed, key=lambda pair: pair[0].tries(pair[1])):
        if is_time_up():
            return False
        step.measure(cell, check_device)
    return True


def error_text(error: Exception) -> str:
    """Type, place and message in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"


def read_report(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The content of a step's file, or that of a new one.

    Args:
        path: the JSON file.
        conditions: device, versions and the like, which all cells of a file share.

    Returns:
        `conditions`, `is_complete`, and `cells` by name.

    Raises:
        ValueError: if the file was measured under other conditions, or cannot be read.
    """
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
