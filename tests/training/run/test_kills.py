"""Runs that are killed at any moment, or resumed by another version of the project, end as undisturbed ones."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from fambav_training.machine import provenance
from fambav_training.run.checkpointing import list_checkpoints
from support.training_runs import FLAGS, read_metrics, read_results, train_here, without_time

NUM_KILLS = 50
# Steps that take as long as a checkpoint of each, so that half of the kills come in the middle of one
RUN = {
    **FLAGS,
    "max_train_samples": 120,
    "max_eval_samples": 60,
    "per_device_train_batch_size": 20,
    "max_train_steps": 300,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "fusion_tokens": 1,
    "drop_path_rate": 0.1,
    "random_crop_padding": 1,
    "mixup_alpha": 0.8,
    "logging_steps": 7,
}


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert without_time(read_metrics(folder)) == without_time(read_metrics(undisturbed))
    for name in ("top1", "ema_top1", "train_loss", "steps"):
        assert read_results(folder)[name] == read_results(undisturbed)[name]


def start(folder: Path) -> int:
    """Train in a forked process, which has all modules already; returns its id."""
    process = os.fork()
    if process == 0:
        exit_code = 1
        try:
            with open(os.devnull, "w") as silence:
                sys.stdout = sys.stderr = silence
                train_here(folder, **RUN, checkpointing_steps=1, resume_from_checkpoint="latest")
            exit_code = 0
        finally:
            os._exit(exit_code)
    return process


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows lacks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fifty_kills_change_nothing(tmp_path):
    train_here(tmp_path / "undisturbed", **RUN)
    folder, moments = tmp_path / "killed", random.Random(0)
    kills, steps_at_kills = 0, []
    while kills < NUM_KILLS:
        process = start(folder)
        # Some lives end before the first step, the longest after a dozen
        time.sleep(moments.uniform(0.0, 1.2))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "the run ended before it was killed often enough"
        kills += 1
        steps_at_kills.append(len(list_checkpoints(folder)) if folder.exists() else 0)
    assert max(steps_at_kills) > 10, "no life was long enough to get anywhere"
    _, status = os.waitpid(start(folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same_run(folder, tmp_path / "undisturbed")


@pytest.mark.slow
def test_another_commit_resumes_with_the_same_bits(tmp_path, monkeypatch):
    """What does not change the recipe does not matter; the results name the commit that ended the run."""
    run = {**RUN, "max_train_steps": 12}
    train_here(tmp_path / "undisturbed", **run)
    monkeypatch.setattr(provenance, "git_commit", lambda: "1" * 40)
    train_here(tmp_path / "resumed", **run, checkpointing_steps=5)
    checkpoints = list_checkpoints(tmp_path / "resumed")
    for later in sorted(checkpoints)[1:]:
        for path in later.iterdir():
            path.unlink()
        later.rmdir()
    monkeypatch.setattr(provenance, "git_commit", lambda: "2" * 40)
    train_here(tmp_path / "resumed", **run, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")
    assert read_results(tmp_path / "resumed")["git_commit"] == "2" * 40
