"""The log of a resumed run: behind its checkpoint, and never lost."""

import json
import os
from types import SimpleNamespace

import pytest

from fambav_training.run.log import FILE, MetricsLog, read_log

LINES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 4, "lo')
    return tmp_path


def log(folder, step: int) -> MetricsLog:
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_: None)
    return MetricsLog(accelerator, folder, step, epoch=0)


def test_a_resumed_run_goes_on_behind_its_checkpoint(folder):
    log(folder, step=2).write({"step": 3, "loss": 0.25})
    assert read_log(folder) == [*LINES[:2], {"step": 3, "loss": 0.25}]
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_a_new_run_begins_a_new_log(folder):
    log(folder, step=0)
    assert read_log(folder) == []


def test_a_failure_while_resuming_keeps_the_log(folder, monkeypatch):
    before = (folder / FILE).read_text()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        log(folder, step=2)
    assert (folder / FILE).read_text() == before
