"""Saving: which checkpoints there are, that they change nothing, and a disk that is full."""

import errno
import resource
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from fambav_training.run import checkpointing, trainer
from fambav_training.run.checkpointing import find_checkpoint, read_state
from support.saved_runs import NUM_STEPS, RUN, WEIGHTS, assert_same_run, checkpoint, steps_of, stopped_after
from support.training_runs import command_line, own_process_state, train_here


def test_saving_does_not_change_the_run(saved, whole):
    assert_same_run(saved, whole)
    assert steps_of(saved) == list(range(1, NUM_STEPS + 1))


@pytest.mark.slow
def test_checkpoint_of_every_epoch(whole, tmp_path):
    train_here(tmp_path / "out", **RUN, checkpointing_steps="epoch")
    assert_same_run(tmp_path / "out", whole)
    assert steps_of(tmp_path / "out") == [4, 8, 10]
    shutil.rmtree(checkpoint(tmp_path / "out", 10))
    train_here(tmp_path / "out", **RUN, checkpointing_steps="epoch", resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "out", whole)
    assert steps_of(tmp_path / "out") == [4, 8, 10]


@pytest.mark.slow
def test_checkpoints_every_so_many_steps_and_at_the_end(tmp_path):
    train_here(tmp_path / "out", **RUN, checkpointing_steps=4)
    assert steps_of(tmp_path / "out") == [4, 8, 10]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train_here(tmp_path / "out", **RUN, checkpointing_steps=1, checkpoints_total_limit=2)
    assert steps_of(tmp_path / "out") == [9, 10]


def test_no_checkpoints_unless_asked_for(whole):
    assert not (whole / "checkpoints").exists()


def test_rests_of_an_interrupted_write_are_deleted(saved, tmp_path):
    folder = stopped_after(tmp_path / "out", saved, 8)
    for step in (9, 20):  # one that is written again, and one that is not
        rest = folder / "checkpoints" / f".step_{step:06d}.partial"
        rest.mkdir()
        (rest / "optimizer.bin").write_text("half of it")
    assert steps_of(folder) == [8]
    train_here(folder, **RUN, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_000008",
        "step_000009",
        "step_000010",
    ]
    assert read_state(checkpoint(folder, 9))["position"]["step"] == 9


def test_new_run_into_a_folder_with_checkpoints_is_refused(saved):
    before = sorted(path.stat().st_mtime_ns for path in saved.rglob("*"))
    with pytest.raises(ValueError, match="--output_dir .*--resume_from_checkpoint latest"):
        train_here(saved, **RUN)
    assert sorted(path.stat().st_mtime_ns for path in saved.rglob("*")) == before


# ---- a disk that is full ----


def assert_second_checkpoint_fails(folder: Path, monkeypatch) -> str:
    """The command ends with one line; the first checkpoint is as it was. Returns the line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *command_line(**RUN, checkpointing_steps=2, output_dir=folder)])
    with own_process_state(), pytest.raises(SystemExit) as end:
        train.main()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]
    assert read_state(checkpoint(folder, 2))["position"]["step"] == 2
    assert find_checkpoint("latest", folder, read_state(checkpoint(folder, 2))["arguments"], 1)
    assert not (folder / "all_results.json").exists()
    assert end.value.code.startswith(f"error: checkpoint {checkpoint(folder, 4)} cannot be written")
    return end.value.code


# Smaller than every file, than the optimizer's and the weights' average, than the optimizer's alone
@pytest.mark.parametrize(
    "num_bytes", [pytest.param(0, marks=pytest.mark.slow), 40_000, pytest.param(60_000, marks=pytest.mark.slow)]
)
def test_full_disk_leaves_the_checkpoints_before(whole, tmp_path, monkeypatch, num_bytes):
    save_state = trainer.Accelerator.save_state

    def save_state_on_full_disk(self, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if "step_000004" in path:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            save_state(self, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Accelerator, "save_state", save_state_on_full_disk)
        assert "MiB are free" in assert_second_checkpoint_fails(tmp_path / "out", patch)
    train_here(tmp_path / "out", **RUN, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "json.dumps"])
def test_failure_while_completing_leaves_the_checkpoints_before(tmp_path, monkeypatch, function):
    complete = checkpointing._complete

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def complete_on_full_disk(partial, path, state):
        with monkeypatch.context() as patch:
            if path.name == "step_000004":
                patch.setattr(function, fail)
            complete(partial, path, state)

    monkeypatch.setattr(checkpointing, "_complete", complete_on_full_disk)
    assert "No space left on device" in assert_second_checkpoint_fails(tmp_path / "out", monkeypatch)


def test_checkpoint_holds_the_weights_of_its_step(saved, whole):
    last, before = load_file(checkpoint(saved, NUM_STEPS) / WEIGHTS), load_file(checkpoint(saved, 9) / WEIGHTS)
    released = load_file(whole / WEIGHTS)
    assert last.keys() == released.keys()
    assert all((last[name] == released[name]).all() for name in released)
    assert any((before[name] != released[name]).any() for name in released)
