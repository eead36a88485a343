"""The training runs behind a table: a process for every cell and seed, which resumes where it was stopped."""

import dataclasses
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fambav_training.cli import parse_arguments
from fambav_training.paper.tables import Cell
from fambav_training.processes import run_to_end, train_command
from fambav_training.release.saving import RESULTS_FILE
from fambav_training.run.arguments import TrainingArguments, recipe_of

_LOG_TAIL_LINES = 15
# Measures of a finished run that a table shows
REPORTED = (
    "top1",
    "top5",
    "ema_top1",
    "train_seconds",
    "processor_seconds",
    "peak_memory_bytes",
    "start_memory_bytes",
)


@dataclass(frozen=True)
class Run:
    """A cell with a seed: one training run.

    Attributes:
        cell: name of the cell.
        seed: seed of the run.
        folder: where train.py leaves what it makes.
        flags: flags of train.py.
        table_1_folder: folder of the same run in Table 1, if there is one; it is not repeated if it is finished there.
    """

    cell: str
    seed: int
    folder: Path
    flags: dict[str, Any]
    table_1_folder: Path | None = None

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
        return train_command(self.words)

    @property
    def source(self) -> Path:
        """The folder whose results are this run's: its own, or Table 1's if only that one has finished it."""
        if self.table_1_folder is not None and not (self.folder / RESULTS_FILE).exists():
            try:
                if self._read(self.table_1_folder) is not None:
                    return self.table_1_folder
            except ValueError:
                pass  # of Table 1 with other flags, so it is not the same run
        return self.folder

    def results(self) -> dict[str, Any] | None:
        """What the finished run reports, or None if it is not finished.

        Raises:
            ValueError: if it was trained with other flags than this run's, or does not report all that a table has.
        """
        return self._read(self.source)

    def _read(self, folder: Path) -> dict[str, Any] | None:
        path = folder / RESULTS_FILE
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        if missing := [name for name in REPORTED if name not in results]:
            raise ValueError(f"{path}: without {missing[0]}, made by an older version; delete that folder")
        expected = recipe_of(*parse_arguments(TrainingArguments, "", self.words))
        # Beside the flags of training, arguments are the fields of the model that were given
        flags = {field.name for field in dataclasses.fields(TrainingArguments)}
        arguments = results["arguments"]
        own = TrainingArguments(**{name: value for name, value in arguments.items() if name in flags})
        found = recipe_of(own, {name: value for name, value in arguments.items() if name not in flags})
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{path}: trained with --{name} {found.get(name)}, expected {expected.get(name)}, that of this "
                    "call; give another --output_dir, or delete that folder"
                )
        return results


def table_runs(
    cells: list[Cell], seeds: Iterable[int], flags: dict[str, Any], folder: Path, table_1: Path
) -> dict[str, list[Run]]:
    """The runs of every cell, one per seed, in the table's folder. Cells that another one stands for have none.

    `table_1` is the folder of Table 1 for the same model.
    """
    runs = {}
    for cell in cells:
        runs[cell.name] = []
        for seed in seeds if cell.same_as is None else ():
            run_folder = folder / f"{cell.name}_seed{seed}"
            ours = {"seed": seed, "output_dir": run_folder, "checkpointing_steps": "epoch"}
            resume = {"checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
            run_flags = {**flags, **cell.fields, **ours, **resume}
            table_1_folder = None if cell.in_table_1 is None else table_1 / f"{cell.in_table_1}_seed{seed}"
            runs[cell.name].append(Run(cell.name, seed, run_folder, run_flags, table_1_folder))
    return runs


def launch(run: Run) -> int:
    """Run a cell in a process of its own, whose time and memory are its own. Returns the exit code."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as log:
        log.write(f"$ {shlex.join(run.command)}\n")
        log.flush()
        return run_to_end(run.command, output=log)


def log_tail(run: Run) -> str:
    """The last lines that a run printed."""
    # A progress bar goes back to the start of its line instead of beginning a new one.
    lines = run.log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])
