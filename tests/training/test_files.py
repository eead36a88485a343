"""Files and folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from fambav_training.files import atomic_file, atomic_folder


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included, and what it holds."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old_folder(tmp_path) -> Path:
    folder = tmp_path / "parent" / "run"
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    return folder


# ---- atomic_file ----


def test_file_appears_when_the_block_ends(tmp_path):
    with atomic_file(tmp_path / "a.json") as new:
        new.write_text("new")
        assert new.parent == tmp_path and new.name != "a.json"  # on one disk, so that moving it is one step
    assert content(tmp_path) == {"a.json": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_written", [True, False])
def test_failing_block_keeps_the_old_file(tmp_path, error, is_written):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(error):
        with atomic_file(tmp_path / "a.json") as new:
            if is_written:
                new.write_text("half")
            raise error
    assert content(tmp_path) == {"a.json": "old"}


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    killed = atomic_file(tmp_path / "a.json")
    killed.__enter__().write_text("a long half of a file")
    with atomic_file(tmp_path / "a.json") as new:
        new.write_text("new")
    assert content(tmp_path) == {"a.json": "new"}


# ---- atomic_folder ----


def test_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "er" / "run"
    with atomic_folder(path) as folder:
        assert not path.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "new.txt").write_text("new")
        assert folder.parent == path.parent  # on one disk, so that moving it is one step
    assert content(tmp_path) == {"deep/er/run/sub/new.txt": "new"}
    assert path.stat().st_mode & 0o777 == 0o755  # a temporary folder is closed to others, a release is not


def test_folder_replaces_the_old_one_as_a_whole(old_folder):
    with atomic_folder(old_folder) as folder:
        (folder / "new.txt").write_text("new")
        assert content(old_folder) == {"old.txt": "old"}
    assert content(old_folder.parent) == {"run/new.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failing_block_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "new.txt").write_text("new")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_failing_block_keeps_the_old_folder(old_folder):
    with pytest.raises(ValueError):
        with atomic_folder(old_folder) as folder:
            (folder / "new.txt").write_text("new")
            raise ValueError
    assert content(old_folder.parent) == {"run/old.txt": "old"}


def test_failing_move_keeps_the_old_folder(old_folder, monkeypatch):
    replace = os.replace

    def refuse_new_folder(source, target):
        if (Path(source) / "new.txt").exists():
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_new_folder)
    with pytest.raises(OSError, match="no space left"):
        with atomic_folder(old_folder) as folder:
            (folder / "new.txt").write_text("new")
    assert content(old_folder.parent) == {"run/old.txt": "old"}


def test_link_to_a_folder_stays_a_link(old_folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old_folder, target_is_directory=True)
    with atomic_folder(link) as folder:
        (folder / "new.txt").write_text("new")
    assert link.is_symlink()
    assert content(old_folder.parent) == {"run/new.txt": "new"}
