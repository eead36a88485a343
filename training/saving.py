"""Saving a trained model: a folder that appears whole or not at all, with everything that belongs to a release."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from model_card import create_card


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` and move it there when the block ends well.

    What stood at `path` before stays untouched until then, and if the block fails nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, replaced / path.name)
            os.replace(staging, path)
            shutil.rmtree(replaced)
        else:
            os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_release(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, results: dict[str, Any]) -> None:
    """Write what a user needs to load and to judge a model: weights, code, processor, results and card."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    create_card(model.config, results).save(folder / "README.md")
