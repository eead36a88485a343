"""Run Python in a process of its own, as a user does: offline, without a terminal, with its output captured."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


# Long enough for the slowest of these processes on a machine that is busy with others; it ends those that hang.
DEADLINE_SECONDS = 900


def run_python(*arguments: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess:
    """Run `python *arguments` with these variables added to the environment. The caller looks at the return code."""
    # Threads that wait for one another leave the core to those that work, in case other processes are busy too.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
