"""Checkpoints that are damaged or hold code: they are named, and the one before them is used."""

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fambav_training.run.checkpointing import CheckpointError, read_state
from support.saved_runs import RUN, WEIGHTS, assert_same_run, checkpoint, edit_state, find
from support.training_runs import train_here


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
