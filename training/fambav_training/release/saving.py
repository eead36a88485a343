"""Saving a trained model: a folder that appears whole or not at all, with everything that belongs to a release."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.release.model_card import create_card
from fambav_training.run.checkpointing import FOLDER as CHECKPOINTS
from fambav_training.run.checkpointing import list_checkpoints
from fambav_training.run.log import FILE as METRICS_FILE

RESULTS_FILE = "all_results.json"


@contextlib.contextmanager
def release_files(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside `folder`, and move its files up when the block ends well.

    `all_results.json` comes last: a folder with it holds a whole release. If the block fails, all is as before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".release.", dir=folder))
    try:
        yield staging
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == RESULTS_FILE):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output_folder(path: Path, is_resumed: bool = False) -> None:
    """Refuse a folder in which a run would destroy something.

    Raises:
        ValueError: if `path` is neither new, nor empty, nor the folder of an earlier run, or holds checkpoints of a
            run that is not resumed, or cannot be written.
    """
    if any(parent.is_file() for parent in (path, *path.parents)):
        raise ValueError(f"--output_dir {path}: expected a folder, this is a file")
    if path.exists() and any(path.iterdir()):
        if not any((path / name).exists() for name in (RESULTS_FILE, CHECKPOINTS, METRICS_FILE)):
            raise ValueError(f"--output_dir {path}: expected a folder that is new, empty or of an earlier run")
        if list_checkpoints(path) and not is_resumed:
            raise ValueError(
                f"--output_dir {path}: holds checkpoints of an earlier run; give --resume_from_checkpoint latest to "
                "resume it, or another folder"
            )
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {path}: {existing} cannot be written")


def save_release(
    folder: Path,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    results: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what a user needs to load and to judge a model: weights, code, processor, results and card.

    `dtype` is that of the file. The configuration keeps the model's, so that it is loaded as it was scored.
    """
    weights = {
        name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    create_card(model.config, results).save(folder / "README.md")
