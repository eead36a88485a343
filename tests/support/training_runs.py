"""Runs of the training script that several test files share: their flags, and starting them here or as processes."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

import train
from fambav_training.cli import parse_arguments
from support.child_process import REPOSITORY, run_python

FLAGS = {
    "dataset_name": "digits",
    "max_train_samples": 512,
    "max_train_steps": 24,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 60,
    "learning_rate": 0.01,
    "ema_decay": 0.9,
    "cpu": True,
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 4,
    "fusion_tokens": 3,
    "random_crop_padding": 0,
    "horizontal_flip_prob": 0,
    "mixup_alpha": 0,
    "random_erasing_prob": 0,
}


def command_line(**flags: Any) -> list[str]:
    """Flags as words; a list becomes several words, None leaves a flag out."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """A run sets the number of threads, and accelerate keeps the settings of the first `Accelerator` of a process."""
    num_threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train_here(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Train in this process with `FLAGS` and these changes."""
    flags = {**FLAGS, "output_dir": output_dir, **changes}
    with own_process_state():
        return train.run(*parse_arguments(train.TrainingArguments, "", command_line(**flags)))


def train_silently(output_dir: Path, **changes: Any) -> None:
    """What a process does that nobody listens to."""
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        train_here(output_dir, **changes)


def run_in_two_processes(output_dir: Path, **changes: Any) -> subprocess.CompletedProcess:
    """Train in two processes with `FLAGS` and these changes."""
    # `accelerate launch --cpu --num_processes=2` starts one process; also on CPUs it takes --multi_gpu to start two.
    return run_python(
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"),
        *(REPOSITORY / "training" / "train.py", *command_line(**{**FLAGS, **changes}), "--output_dir", output_dir),
    )


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "train_seconds"} for record in records]
