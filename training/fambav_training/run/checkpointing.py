"""Checkpoints of a training run: folders that exist whole or not at all, and are looked at before they are loaded.

    OUTPUT_DIR/checkpoints/step_000100/
        model.safetensors, optimizer.bin          weights, and the optimizer's state
        custom_checkpoint_0.pkl, _1.pkl           average of the weights, learning-rate schedule
        random_states_0.pkl, ...                  of every process
        trainer_state.json                        position in the run, the flags it was made with, a digest of every
                                                  file and of itself

A checkpoint is written beside its place and moved there last. Whatever happens before leaves the previous ones as they
were. One that was changed later, be it by a bit, is never loaded. Nothing in it is unpickled but tensors and plain
values.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from safetensors import SafetensorError
from transformers.utils import logging

logger = logging.get_logger(__name__)

FOLDER = "checkpoints"
STATE_FILE = "trainer_state.json"
LATEST = "latest"
_FORMAT = 2
_DIGEST = "sha256"
_NAME = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def save_checkpoint(accelerator: Accelerator, path: Path, state: dict[str, Any]) -> None:
    """Write everything that was prepared or registered, and `state`, to a new folder. All processes call this.

    A whole checkpoint of the same step of the same run that stands there already is left as it is.

    Raises:
        OSError: if it cannot be written. Nothing is left at `path` then, and nothing else is touched.
    """
    [exists] = broadcast_object_list([_is_whole(path, state["arguments"])])
    if exists:
        return
    partial = path.with_name(f".{path.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _complete(partial, path, {"format": _FORMAT, "num_processes": accelerator.num_processes, **state})
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # all of them are raised by a full disk
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(f"checkpoint {path} cannot be written ({free:.0f} MiB are free): {error}") from error
        raise
    accelerator.wait_for_everyone()


def _complete(partial: Path, path: Path, state: dict[str, Any]) -> None:
    write_state(partial, state)
    for file in partial.rglob("*"):
        _sync(file)
    _sync(partial)
    if path.exists():  # damaged, or of another run
        shutil.rmtree(path)
    os.replace(partial, path)
    _sync(path.parent)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write `trainer_state.json` of a folder: `state`, and what all files must be like when they are read again."""
    files = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, _DIGEST: _digest_of_file(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and file != path / STATE_FILE
    }
    content = {**state, "files": files}
    (path / STATE_FILE).write_text(json.dumps({**content, _DIGEST: _digest_of_json(content)}, indent=1) + "\n")


def _digest_of_file(path: Path) -> str:
    digest = hashlib.new(_DIGEST)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.new(_DIGEST, json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power cut cannot leave a name without its content."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders; it writes names as it writes files
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_whole(path: Path, arguments: dict[str, Any]) -> bool:
    try:
        return read_state(path)["arguments"] == arguments
    except CheckpointError:
        return False


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Read everything that was prepared or registered back from a checkpoint. All processes call this.

    Raises:
        CheckpointError: if a file holds anything but tensors and plain values. Nothing of it was run then.
    """
    for file in sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pkl", ".pt")):
        try:
            load(file, map_location="cpu", weights_only=True)  # accelerate does not ask for it in custom_checkpoint_*
        except Exception as error:  # damaged bytes make the unpickler fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"checkpoint {path}: {file.name} is damaged or holds more than tensors and plain values ({reason})"
            ) from error
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path}: does not fit this model, expected the same one, and torch.compile used or not as "
            f"before ({reason})"
        ) from error


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return output_dir / FOLDER / f"step_{step:06d}"


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    folders = [path for path in (output_dir / FOLDER).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_step_of)


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Delete all but the newest `limit` checkpoints, and what interrupted writes left behind."""
    for partial in (output_dir / FOLDER).glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


def find_checkpoint(wanted: str, output_dir: Path, recipe: dict[str, Any], num_processes: int) -> Path | None:
    """The checkpoint to resume from.

    Args:
        wanted: a folder, or `"latest"`: the newest one in `output_dir` that is whole.
        output_dir: folder of the run.
        recipe: flags that must be those of the checkpoint.
        num_processes: processes of this run.

    Returns:
        the folder, or None if the latest of a run without any is wanted.

    Raises:
        CheckpointError: if it is missing, damaged or of another run.
    """
    if wanted != LATEST:
        path = Path(wanted)
        state = read_state(path)
        _check_same_run(path, state, recipe, num_processes)
        _check_newest(path, state["position"]["step"], output_dir)
        return path
    damaged = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            state = read_state(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for error in damaged:
            logger.warning(f"not resumed from: {error}")
        _check_same_run(path, state, recipe, num_processes)
        return path
    if damaged:
        raise damaged[0]
    logger.warning(f"--resume_from_checkpoint latest: {output_dir} has no checkpoint yet, training starts anew")
    return None


def _check_newest(path: Path, step: int, output_dir: Path) -> None:
    """Checkpoints of later steps would be taken for newer than those that are written from here on."""
    later = [other.name for other in list_checkpoints(output_dir) if _step_of(other) > step]
    if later:
        raise CheckpointError(
            f"checkpoint {path}: {output_dir / FOLDER} holds later ones ({', '.join(later)}); delete them, or give "
            "another --output_dir"
        )


def read_state(path: Path) -> dict[str, Any]:
    """The content of `trainer_state.json`, after all files were found to be there.

    Raises:
        CheckpointError: if `path` is no checkpoint, or one of its files is missing or was changed.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text())
        files, format_ = state["files"], state["format"]
        digest = state.pop(_DIGEST, None)
    except FileNotFoundError as error:
        kind = "a folder without" if path.is_dir() else "no folder with"
        raise CheckpointError(f"checkpoint {path}: {kind} a {STATE_FILE}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path}: {STATE_FILE} cannot be read ({error!r})") from error
    if format_ != _FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {format_!r}, expected {_FORMAT}")
    if digest != _digest_of_json(state):
        raise CheckpointError(f"checkpoint {path}: {STATE_FILE} was changed after it was written")
    for name, expected in files.items():
        file, size = path / name, expected["bytes"]
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(f"checkpoint {path}: {name} {found}, expected {size} bytes")
        if _digest_of_file(file) != expected[_DIGEST]:
            raise CheckpointError(f"checkpoint {path}: {name} was changed after it was written")
    return state


def _check_same_run(path: Path, state: dict[str, Any], recipe: dict[str, Any], num_processes: int) -> None:
    if state["num_processes"] != num_processes:
        raise CheckpointError(
            f"checkpoint {path}: made by {state['num_processes']} process(es), expected {num_processes} as in this run"
        )
    saved = state["arguments"]
    for name in sorted(saved.keys() | recipe.keys()):
        if saved.get(name) != recipe.get(name):
            raise CheckpointError(
                f"checkpoint {path}: made with --{name} {saved.get(name)}, expected {recipe.get(name)} as in this "
                "run; to train a finished model further, give it as --model_name_or_path, and another --output_dir"
            )
