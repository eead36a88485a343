"""Training runs in processes of their own, which are not left alone when the caller stops, and how it stops."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def train_command(words: Iterable[str]) -> list[str]:
    """train.py with these words as a process; without accelerate's launcher, which would not wait for a checkpoint."""
    return [sys.executable, str(Path(__file__).parents[1] / "train.py"), *words]


def run_to_end(command: list[str], output: IO[str] | None = None, **environment: str) -> int:
    """Run a process, whose time and memory are its own, and return its exit code.

    If waiting for it is interrupted, as by Ctrl-C, it is asked to stop and waited for: train.py saves a checkpoint
    before it leaves.

    Args:
        command: the words of its command line.
        output: file for all that it prints; if None, it prints where this process does.
        environment: variables for it, where this process has none of that name.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        # Threads that wait without spinning, which costs nothing here and much on a machine that is busy
        env={"OMP_WAIT_POLICY": "PASSIVE", **environment, **os.environ},
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def exit_on_signal(*numbers: int) -> None:
    """Leave by `SystemExit` when one of these signals arrives, so that what has begun is ended in order."""
    for number in numbers:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
