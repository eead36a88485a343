"""Stopping and resuming a run at any step, without changing it, and checkpoints that are damaged or of another run."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import train
from fambav_training.cli import parse_arguments
from fambav_training.run import checkpointing, trainer
from fambav_training.run.arguments import TrainingArguments, recipe_of
from fambav_training.run.checkpointing import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_state,
    write_state,
)
from support.child_process import DEADLINE_SECONDS, REPOSITORY
from support.training_runs import (
    FLAGS,
    command_line,
    own_process_state,
    read_metrics,
    read_results,
    train_here,
    without_time,
)

NUM_STEPS = 10
# Everything that is random is on. Ten batches per epoch make four steps, the last one of a single batch.
RUN = {
    **FLAGS,
    "max_train_samples": 100,
    "max_eval_samples": 60,
    "max_train_steps": NUM_STEPS,
    "per_device_train_batch_size": 10,
    "gradient_accumulation_steps": 3,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "fusion_tokens": 1,
    "drop_path_rate": 0.1,
    "random_crop_padding": 1,
    "horizontal_flip_prob": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1,
    "random_erasing_prob": 0.25,
    "logging_steps": 2,  # at odd steps there are losses that no line of the log has yet
    "evaluation_epochs": 1,
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was neither interrupted nor saved on the way."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train_here(folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of the same run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    train_here(folder, **RUN, checkpointing_steps=1)
    return folder


def stopped_after(folder: Path, saved: Path, *steps: int) -> Path:
    """A folder with some of the checkpoints of a run, and its whole log."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(saved / "metrics.jsonl", folder)
    for step in steps:
        shutil.copytree(checkpoint(saved, step), checkpoint(folder, step))
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}"


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def assert_same_run(folder: Path, whole: Path) -> None:
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert without_time(read_metrics(folder)) == without_time(read_metrics(whole))
    results, expected = read_results(folder), read_results(whole)
    for name in ("top1", "top5", "ema_top1", "ema_top5", "train_loss", "steps", "epochs", "nonfinite_steps"):
        assert results[name] == expected[name], name


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


def test_saving_does_not_change_the_run(saved, whole):
    assert_same_run(saved, whole)
    assert steps_of(saved) == list(range(1, NUM_STEPS + 1))


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


# ---- which checkpoints there are ----


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


# ---- damaged checkpoints ----


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A run that was stopped, with checkpoints of steps 8 and 9."""
    return stopped_after(tmp_path / "out", saved, 8, 9)


def find(wanted: str | Path, folder: Path, num_processes: int = 1, **changes: Any) -> Path | None:
    recipe = json.loads((checkpoint(folder, 8) / "trainer_state.json").read_text())["arguments"]
    return find_checkpoint(str(wanted), folder, {**recipe, **changes}, num_processes)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_newest_checkpoint_is_the_one_of_the_highest_step(folder):
    shutil.copytree(checkpoint(folder, 9), folder / "checkpoints" / "step_1000000")
    assert find("latest", folder) == folder / "checkpoints" / "step_1000000"


def test_damaged_newest_checkpoint_is_passed_over(folder, whole, caplog):
    cut(checkpoint(folder, 9) / "optimizer.bin")
    assert find("latest", folder) == checkpoint(folder, 8)
    [warning] = [record.message for record in caplog.records]
    assert "not resumed from" in warning and "step_000009: optimizer.bin has" in warning
    train_here(folder, **RUN, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)
    assert read_state(checkpoint(folder, 9))  # replaced by a whole one


def test_damaged_explicit_checkpoint_is_an_error(folder):
    file = checkpoint(folder, 9) / "optimizer.bin"
    size = file.stat().st_size
    cut(file)
    with pytest.raises(CheckpointError) as error:
        find(checkpoint(folder, 9), folder)
    assert str(error.value).endswith(f"step_000009: optimizer.bin has {size // 2} bytes, expected {size} bytes")


def damage(path: Path, random: np.random.Generator) -> str:
    """Flip one bit of a random file, or cut it somewhere; every place of the checkpoint is as likely as any other.

    Returns the name of the file.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    # Half of the time any file, however small
    weights = sizes / sizes.sum() if random.random() < 0.5 else None
    file = files[random.choice(len(files), p=weights)]
    content = bytearray(file.read_bytes())
    place = random.integers(len(content))
    if random.random() < 0.2:
        del content[place:]
    else:
        content[place] ^= 1 << random.integers(8)
    file.write_bytes(content)
    return file.name


def test_whatever_was_changed_is_named_and_the_checkpoint_before_it_is_used(folder):
    random, kept = np.random.default_rng(0), folder / "kept"
    newest = checkpoint(folder, 9)
    shutil.copytree(newest, kept)
    for _ in range(1000):
        name = damage(newest, random)
        with pytest.raises(CheckpointError, match=rf"step_000009: {re.escape(name)} |step_000009: format"):
            find(newest, folder)
        assert find("latest", folder) == checkpoint(folder, 8)
        shutil.copy(next(kept.rglob(name)), next(newest.rglob(name)))
    assert find("latest", folder) == newest


def test_missing_file_is_an_error(folder):
    file = checkpoint(folder, 9) / WEIGHTS
    size = file.stat().st_size
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing, expected {size} bytes"):
        find(checkpoint(folder, 9), folder)
    assert find("latest", folder) == checkpoint(folder, 8)


def test_nothing_but_damaged_checkpoints_is_an_error(folder):
    cut(checkpoint(folder, 8) / WEIGHTS)
    cut(checkpoint(folder, 9) / "optimizer.bin")
    with pytest.raises(CheckpointError, match="step_000009: optimizer.bin has"):  # not silently all over again
        find("latest", folder)


def test_foreign_folder_is_an_error(folder, tmp_path):
    with pytest.raises(CheckpointError, match="missing: no folder with a trainer_state.json"):
        find(tmp_path / "missing", folder)
    with pytest.raises(CheckpointError, match="checkpoints: a folder without a trainer_state.json"):
        find(folder / "checkpoints", folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {}}'])
def test_unreadable_state_is_an_error(folder, content):
    (checkpoint(folder, 9) / "trainer_state.json").write_text(content)
    with pytest.raises(CheckpointError, match="step_000009: trainer_state.json cannot be read"):
        find(checkpoint(folder, 9), folder)


def edit_state(path: Path, **changes: Any) -> None:
    """Other state, with the digests that belong to it and to the files as they are now."""
    state = json.loads((path / "trainer_state.json").read_text())
    del state["sha256"]
    write_state(path, {**state, **changes})


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


# ---- files that would run code ----


class Bomb:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PICKLES = ["optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl"]


def test_list_of_pickles_is_complete(saved):
    files = {path.name for path in checkpoint(saved, 9).iterdir()}
    assert files == {*PICKLES, WEIGHTS, "trainer_state.json"}


@pytest.mark.parametrize("name", PICKLES)
def test_no_code_of_a_checkpoint_is_run(folder, tmp_path, name):
    file = checkpoint(folder, 9) / name
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "code was run"), protocol=2))
    edit_state(checkpoint(folder, 9))
    assert find("latest", folder) == checkpoint(folder, 9)  # whole, as far as digests can say
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} .*more than tensors and plain values"):
        train_here(folder, **RUN, resume_from_checkpoint="latest")
    assert not (tmp_path / "code was run").exists()
    pickle.loads(file.read_bytes())  # the file is as bad as it is meant to be
    assert (tmp_path / "code was run").exists()


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


# ---- an older checkpoint, other images, another model ----


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
