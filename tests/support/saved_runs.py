"""A small run with everything random in it, its checkpoints, and whether two runs are the same."""

import json
import shutil
from pathlib import Path
from typing import Any

from fambav_training.run.checkpointing import find_checkpoint, list_checkpoints, write_state
from support.training_runs import FLAGS, read_metrics, read_results, without_time

# The smallest model that does all that a run can resume wrongly, on images that are drawn at random
TINY = {
    **FLAGS,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "fusion_tokens": 1,
    "drop_path_rate": 0.1,
    "random_crop_padding": 1,
    "mixup_alpha": 0.8,
}
NUM_STEPS = 10
# Everything that is random is on. Ten batches per epoch make four steps, the last one of a single batch.
RUN = {
    **TINY,
    "max_train_samples": 100,
    "max_eval_samples": 60,
    "max_train_steps": NUM_STEPS,
    "per_device_train_batch_size": 10,
    "gradient_accumulation_steps": 3,
    "horizontal_flip_prob": 0.5,
    "cutmix_alpha": 1,
    "random_erasing_prob": 0.25,
    "logging_steps": 2,  # at odd steps there are losses that no line of the log has yet
    "evaluation_epochs": 1,
}
WEIGHTS = "model.safetensors"


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


def find(wanted: str | Path, folder: Path, num_processes: int = 1, **changes: Any) -> Path | None:
    recipe = json.loads((checkpoint(folder, 8) / "trainer_state.json").read_text())["arguments"]
    return find_checkpoint(str(wanted), folder, {**recipe, **changes}, num_processes)


def edit_state(path: Path, **changes: Any) -> None:
    """Other state, with the digests that belong to it and to the files as they are now."""
    state = json.loads((path / "trainer_state.json").read_text())
    del state["sha256"]
    write_state(path, {**state, **changes})
