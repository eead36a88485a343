"""A Hub that runs here, and a release to send there."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.release.saving import save_release
from modeling_fambav import FambaVForImageClassification
from support.helpers import tiny_config
from support.hub_server import HubServer, Repository, User
from support.releases import LEFT_BEHIND, READ_TOKEN, TOKEN, add_repository, make_results


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The output folder of a run, with what it leaves there besides the release. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "release"
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    model = FambaVForImageClassification(tiny_config())
    save_release(folder, model, processor, make_results(model.config))
    (folder / "metrics.jsonl").write_text('{"loss": 0.5}\n')
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not part of the release")
    return folder


@pytest.fixture
def folder(release, tmp_path) -> Path:
    """A release that a test may change."""
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    """A Hub, and a client in this process that talks to it as ann and does not wait between attempts."""
    with HubServer() as hub:
        hub.users = {TOKEN: User("ann"), READ_TOKEN: User("ann", can_write=False)}
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "stored_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def repository(hub) -> Repository:
    return add_repository(hub)
