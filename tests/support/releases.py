"""A Hub of the tests, its users and repositories, and what a run leaves to be published there."""

import sys
from pathlib import Path
from typing import Any

import pytest

import publish
from fambav_training.release.hub import PublishError
from modeling_fambav import FambaVConfig
from support.hub_server import HubServer, Repository

TOKEN = "hf_verysecrettoken"
READ_TOKEN = "hf_thisonemayonlyread"
ARGUMENTS = {
    "dataset_name": "digits",
    "validation_split": None,
    "output_dir": "outputs/some run",
    "max_train_steps": 440,
    "learning_rate": 0.002,
    "cpu": True,
    "seed": 17,
    "image_size": (16, 16),
    "fusion_strategy": "upper",
    "fusion_tokens": 2,
}
LEFT_BEHIND = (
    "checkpoints/step_000001/model.safetensors",
    "logs/fambav/run.yml",
    "fambav/events.out.tfevents.1",
    "nonfinite_step_000007/report.json",
    ".release.x/config.json",
    ".hidden",
    "model.safetensors.partial",
    "__pycache__/token_fusion.pyc",
)


def make_results(config: FambaVConfig, **changes: Any) -> dict[str, Any]:
    """What `all_results.json` holds, with numbers that can be told apart."""
    return {
        "top1": 81.23456,
        "top5": 98.76543,
        "ema_top1": 82.34567,
        "ema_top5": 97.65432,
        "train_loss": 0.5,
        "train_seconds": 57.61,
        "images_per_second": 488.4,
        "peak_memory_bytes": 839 * 2**20,
        "start_memory_bytes": 600 * 2**20,
        "sequence_lengths": config.sequence_lengths,
        "num_parameters": 215_818,
        "steps": 440,
        "epochs": 20,
        "seed": 17,
        "scan_backend": "numba",
        "dataset": "digits",
        "train_images": 1437,
        "validation_images": 360,
        "arguments": ARGUMENTS,
        "device": "cpu: Some Processor, 2 cores",
        "num_processes": 3,
        "num_threads": 2,
        "mixed_precision": "bf16",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "git_commit": "0123456789abcdef-dirty",
        **changes,
    }


def add_repository(hub: HubServer, name: str = "ann/tiny", **fields) -> Repository:
    hub.repositories[name] = Repository(**{"is_private": False, **fields})
    return hub.repositories[name]


def client_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """What makes the client of another process talk to this Hub as ann."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def messages(repository: Repository) -> list[str]:
    return [commit.message for commit in repository.commits]


def error_of(function, *arguments) -> str:
    """The message of the error that a call ends with."""
    with pytest.raises(PublishError) as raised:
        function(*arguments)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


def run_main(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    publish.main()
