"""Stopping and resuming a run at any step without changing it, and checkpoints of another run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import train
from fambav_training.cli import parse_arguments
from fambav_training.run import trainer
from fambav_training.run.arguments import TrainingArguments, recipe_of
from fambav_training.run.checkpointing import CheckpointError, list_checkpoints, read_state
from support.child_process import DEADLINE_SECONDS, REPOSITORY
from support.saved_runs import (
    NUM_STEPS,
    RUN,
    WEIGHTS,
    assert_same_run,
    checkpoint,
    edit_state,
    find,
    steps_of,
    stopped_after,
)
from support.training_runs import command_line, read_metrics, train_here

# ---- stopped from outside, in processes of their own ----

# A pause after each line of the log, so that a signal arrives before the run has ended.
SLOW_RUN = """
import runpy, sys, time
sys.path.insert(0, sys.argv[1])
from fambav_training.run.log import MetricsLog
write = MetricsLog.write
MetricsLog.write = lambda *arguments: (write(*arguments), time.sleep(0.4))
sys.argv[:2] = [sys.argv[1] + "/train.py"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The killed run saves at steps 3 and 6 by itself.
SIGNALS = {signal.SIGKILL: {"checkpointing_steps": 3}, signal.SIGTERM: {}, signal.SIGINT: {}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[int, tuple[Path, int, str]]:
    """Folder, exit code and stderr of a run for every signal, which it got after its first lines of the log."""
    folder = tmp_path_factory.mktemp("stopped")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    processes = {}
    for number, flags in SIGNALS.items():
        words = [*command_line(**RUN, **flags), "--output_dir", str(folder / number.name)]
        command = [sys.executable, "-c", SLOW_RUN, str(REPOSITORY / "training"), *words]
        processes[number] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        waiting, end = dict(processes), time.monotonic() + DEADLINE_SECONDS
        while waiting and time.monotonic() < end:
            for number, process in list(waiting.items()):
                assert process.poll() is None, process.stderr.read()
                log = folder / number.name / "metrics.jsonl"
                # Lines of steps 2, 4 and 4, the end of the epoch; the checkpoint of step 3 is whole then.
                if log.exists() and log.read_text().count("\n") >= 3:
                    process.send_signal(number)
                    del waiting[number]
            time.sleep(0.01)
        assert not waiting
        return {
            number: (folder / number.name, process.wait(DEADLINE_SECONDS), process.stderr.read())
            for number, process in processes.items()
        }
    finally:
        for process in processes.values():
            process.kill()


def resume_copy(stopped_folder: Path, tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "out"
    shutil.copytree(stopped_folder, folder)
    train_here(folder, **RUN, **changes, resume_from_checkpoint="latest")
    return folder


@pytest.mark.slow
def test_killed_run_goes_on_as_if_nothing_had_happened(stopped, whole, tmp_path):
    folder, exit_code, _ = stopped[signal.SIGKILL]
    assert exit_code == -signal.SIGKILL
    assert not (folder / "all_results.json").exists()
    assert steps_of(folder)[0] == 3 and steps_of(folder)[-1] < NUM_STEPS
    assert_same_run(resume_copy(folder, tmp_path, checkpointing_steps=3), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number, expected_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_that_is_asked_to_stop_saves_and_says_so(stopped, whole, tmp_path, number, expected_code):
    folder, exit_code, stderr = stopped[number]
    assert exit_code == expected_code
    [step] = steps_of(folder)
    assert 4 < step < NUM_STEPS
    path = checkpoint(folder, step)
    assert "Traceback" not in stderr
    expected = f"stopped by {number.name}; saved {path}, resume with --resume_from_checkpoint latest"
    assert stderr.splitlines()[-1] == expected and stderr.count("stopped by") == 1
    assert not (folder / "all_results.json").exists()
    assert_same_run(resume_copy(folder, tmp_path), whole)


def test_second_signal_acts_at_once(default_signals):
    previous = signal.getsignal(signal.SIGINT)
    with train.Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous


# ---- resuming at every kind of step ----


# In the middle of the first epoch, at its last step, at the first step of the next one, at the last step but one
@pytest.mark.parametrize(
    "step", [3, pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)]
)
def test_resumed_run_ends_as_the_whole_one(saved, whole, tmp_path, step):
    folder = stopped_after(tmp_path / "out", saved, step)
    train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


def test_resumed_run_trains_only_on_the_rest(saved, tmp_path, monkeypatch):
    folder, steps = stopped_after(tmp_path / "out", saved, 7), []
    train_batch = trainer.Trainer._train_batch

    def counted(self, *args):
        steps.append(self.position.step + (self._unsettled is not None))  # the loss of the last one is read late
        return train_batch(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_train_batch", counted)
    train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert steps == [7, 8, 8, 8, 9, 9, 9]  # the last batch of an epoch is a step of its own


def test_resumed_at_the_very_end_it_only_scores_and_releases(saved, whole, tmp_path, monkeypatch):
    folder = stopped_after(tmp_path / "out", saved, NUM_STEPS)
    monkeypatch.setattr(trainer.Trainer, "_train_batch", lambda *_: pytest.fail("trained on"))
    train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


def test_explicit_checkpoint_goes_into_another_folder(saved, whole, tmp_path):
    train_here(tmp_path / "out", **{**RUN, "evaluation_epochs": None}, resume_from_checkpoint=checkpoint(saved, 6))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert [record["step"] for record in read_metrics(tmp_path / "out")] == [8, 8, 10, 10]


@pytest.mark.slow
def test_line_that_a_kill_left_unfinished_is_written_again(saved, whole, tmp_path):
    folder = stopped_after(tmp_path / "out", saved, 5)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_latest_without_a_checkpoint_starts_anew(whole, tmp_path, caplog):
    train_here(tmp_path / "out", **RUN, resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "out", whole)
    [warning] = [record.message for record in caplog.records if "checkpoint" in record.message]
    assert str(tmp_path / "out") in warning and "starts anew" in warning


def test_old_release_stays_until_the_new_one_is_whole(saved, whole, tmp_path, monkeypatch):
    folder = stopped_after(tmp_path / "out", saved, 9)
    old = {"all_results.json": '{"old": true}', WEIGHTS: "old weights", "README.md": "old card"}
    for name, text in old.items():
        (folder / name).write_text(text)
    seen = []

    def create_card(*_):  # the last file of a release that is written
        seen.append({name: (folder / name).read_text() for name in old})
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("fambav_training.release.saving.create_card", create_card)
        with pytest.raises(RuntimeError, match="out of luck"):
            train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert seen == [old]
    assert {name: (folder / name).read_text() for name in old} == old
    train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


# ---- of another run, with other images or another model ----


def test_checkpoint_of_another_format_is_an_error(folder):
    edit_state(checkpoint(folder, 9), format=1)
    with pytest.raises(CheckpointError, match="step_000009: format 1, expected 2"):
        find(checkpoint(folder, 9), folder)


@pytest.mark.parametrize("wanted", ["latest", "explicit"])
def test_checkpoint_of_another_run_is_an_error(folder, wanted):
    wanted = wanted if wanted == "latest" else checkpoint(folder, 9)
    with pytest.raises(CheckpointError, match="--learning_rate 0.01, expected 0.5"):
        find(wanted, folder, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="--hidden_size 16, expected 32"):
        find(wanted, folder, hidden_size=32)
    with pytest.raises(CheckpointError, match="--dt_rank None, expected 3"):  # not given then, but now
        find(wanted, folder, dt_rank=3)
    with pytest.raises(CheckpointError, match=r"made by 1 process\(es\), expected 2"):
        find(wanted, folder, num_processes=2)


def test_other_arguments_fail_before_training(folder, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "train", lambda *_: pytest.fail("training started"))
    with pytest.raises(CheckpointError, match="--mixup_alpha 0.8, expected 0.5"):
        train_here(folder, **{**RUN, "mixup_alpha": 0.5}, resume_from_checkpoint="latest")


@pytest.mark.slow
def test_flags_that_do_not_change_the_training_may_change(folder, whole):
    changed = {"per_device_eval_batch_size": 7, "max_cached_mib": 0, "dataloader_num_workers": 0}
    train_here(folder, **{**RUN, **changed}, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


def test_older_checkpoint_than_those_that_are_there_is_refused(folder):
    older, *_, newest = list_checkpoints(folder)
    with pytest.raises(CheckpointError, match=f"holds later ones .*{newest.name}.*another --output_dir"):
        find(str(older), folder)
    assert find(str(newest), folder) == newest


def test_workers_of_a_stream_are_part_of_the_run():
    # Each worker reads files of its own, so their number is the order of the images.
    def recipe(**flags):
        words = command_line(dataset_name="images", max_train_steps=1, validation_split="test", **flags)
        return recipe_of(*parse_arguments(TrainingArguments, "", words))

    assert recipe(dataloader_num_workers=1) == recipe(dataloader_num_workers=2)
    one, two = (recipe(streaming=True, dataloader_num_workers=number) for number in (1, 2))
    assert one != two


def test_remedies_that_errors_name_can_be_applied_on_resuming(folder, whole):
    train_here(folder, **{**RUN, "nonfinite_loss": "skip", "max_corrupt_images": 99}, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)


def test_other_number_of_batches_is_an_error(folder, monkeypatch):
    path = list_checkpoints(folder)[-1]
    edit_state(path, batches_per_epoch=read_state(path)["batches_per_epoch"] + 1)
    with pytest.raises(CheckpointError, match="batches per epoch, expected .*--max_cached_mib"):
        train_here(folder, **RUN, resume_from_checkpoint="latest")


def test_weights_that_do_not_fit_are_an_error(folder):
    path = list_checkpoints(folder)[-1]
    weights = load_file(path / "model.safetensors")
    # As torch.compile names them
    save_file({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, path / "model.safetensors")
    edit_state(path)
    with pytest.raises(CheckpointError, match="does not fit this model.*torch.compile"):
        train_here(folder, **RUN, resume_from_checkpoint="latest")
