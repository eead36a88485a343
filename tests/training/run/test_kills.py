"""Runs that are killed at any moment, or resumed by another version of the project, end as undisturbed ones."""

import multiprocessing
import os
import random
import sys
import time

import pytest

from fambav_training.machine import provenance
from fambav_training.run.checkpointing import list_checkpoints
from support.child_process import DEADLINE_SECONDS
from support.saved_runs import TINY, assert_same_run
from support.training_runs import read_results, train_here, train_silently

NUM_KILLS = 50
LONGEST_LIFE = 8  # steps; many lives end before their first
# Steps that take as long as a checkpoint of each, so that half of the kills come in the middle of one
RUN = {
    **TINY,
    "max_train_samples": 120,
    "max_eval_samples": 60,
    "per_device_train_batch_size": 20,
    "max_train_steps": 300,
    "logging_steps": 7,
}


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="Windows cannot fork")
def test_fifty_kills_change_nothing(tmp_path, monkeypatch):
    # Forks of a process that has all modules and no threads; a fork of this one would wait for threads it left behind
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["support.training_runs"])
    warm_up = forks.Process(target=int)  # loading the modules is no part of how long a life may be
    warm_up.start()
    warm_up.join()
    folder, moments = tmp_path / "killed", random.Random(0)

    def start() -> multiprocessing.Process:
        life = {**RUN, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        process = forks.Process(target=train_silently, args=(folder,), kwargs=life)
        process.start()
        return process

    process, born = start(), time.monotonic()
    while not (folder.exists() and len(list_checkpoints(folder)) >= LONGEST_LIFE):
        assert process.is_alive()
        assert time.monotonic() < born + DEADLINE_SECONDS
        time.sleep(0.01)
    longest = time.monotonic() - born
    for kills in range(NUM_KILLS):
        if kills:
            process = start()
            process.join(moments.uniform(0.0, longest))
        assert process.exitcode is None, f"the run ended by itself after {kills} kills"
        process.kill()
        process.join()
    last = start()
    last.join(DEADLINE_SECONDS)
    assert last.exitcode == 0
    train_here(tmp_path / "undisturbed", **RUN)
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
