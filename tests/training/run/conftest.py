"""A small run and its checkpoints, made once: tests that change a folder take a copy."""

from pathlib import Path

import pytest

from support.saved_runs import RUN, stopped_after
from support.training_runs import train_here


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was neither interrupted nor saved on the way."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train_here(folder, **RUN)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The folder of the same run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    train_here(folder, **RUN, checkpointing_steps=1)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A run that was stopped, with checkpoints of steps 8 and 9."""
    return stopped_after(tmp_path / "out", saved, 8, 9)
