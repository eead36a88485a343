"""`metrics.jsonl`: one JSON object per line, written during a run, and sent to trackers if there are any."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fambav_training.files import atomic_file

FILE = "metrics.jsonl"


class MetricsLog:
    """Log of a run, on the main process; the others do nothing.

    A resumed run continues after its checkpoint; lines of later steps and epochs are dropped, they will be run again.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int, epoch: int):
        self._accelerator = accelerator
        self._path = output_dir / FILE
        if accelerator.is_main_process:
            lines = self._path.read_text().splitlines() if step > 0 and self._path.exists() else []
            kept = [line for line in lines if _is_of_the_past(line, step, epoch)]
            with atomic_file(self._path) as new:  # a kill must not cost the lines of the past
                new.write_text("".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Add a record, which has a `step`."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self._accelerator.log({name: value for name, value in record.items() if name != "step"}, record["step"])


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far."""
    return [json.loads(line) for line in (output_dir / FILE).read_text().splitlines()]


def _is_of_the_past(line: str, step: int, epoch: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # a line that a kill left unfinished
        return False
    return record["step"] <= step and record.get("epoch", 0) <= epoch
