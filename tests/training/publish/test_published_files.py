"""A release on the Hub: one commit with a tag, and what is in it."""

import logging
import re

from huggingface_hub import constants
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.release.hub import publish_folder
from fambav_training.release.model_card import LOCATION
from fambav_training.release.quantized import base_model_of, write_quantized_release
from modeling_fambav import FambaVForImageClassification
from support.helpers import tiny_config
from support.releases import LEFT_BEHIND, TOKEN, error_of, messages


def test_release_is_one_commit_with_a_tag(repository, hub, release):
    assert publish_folder(release, "ann/tiny", "v1") == f"{hub.endpoint}/ann/tiny"
    assert messages(repository) == ["initial commit", "Release v1"]
    assert repository.tags == {"v1": repository.main.oid}
    expected = {path.name for path in release.glob("*.*") if path.is_file()} - set(LEFT_BEHIND)
    assert {"modeling_fambav.py", "metrics.jsonl", "model.safetensors", "all_results.json"} < expected
    assert repository.main.files.keys() == expected | {".gitattributes"}
    for name in expected - {"README.md"}:  # in which the name of the repository is filled in
        assert repository.main.files[name] == (release / name).read_bytes(), name


def test_token_is_in_nothing_that_is_uploaded_or_said(repository, release, monkeypatch, capfd, caplog):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level("DEBUG", logger="huggingface_hub")
    publish_folder(release, "ann/tiny")
    assert "authorization: <TOKEN>" in caplog.text  # every request is there
    for name, content in repository.main.files.items():
        assert TOKEN.encode() not in content, name
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text


def test_another_run_makes_no_second_commit(repository, release):
    publish_folder(release, "ann/tiny")
    tags = dict(repository.tags)
    publish_folder(release, "ann/tiny")
    assert len(repository.commits) == 2
    assert repository.tags == tags


def test_default_tag_tells_releases_apart(repository, folder):
    publish_folder(folder, "ann/tiny")
    [first] = repository.tags
    assert re.fullmatch(r"step-440-seed-17-[0-9a-f]{8}", first)
    (folder / "metrics.jsonl").write_text("{}\n")
    publish_folder(folder, "ann/tiny")
    assert len(repository.tags) == 2
    assert repository.tags[first] == repository.commits[1].oid


def test_later_release_keeps_files_that_it_does_not_have(repository, folder):
    publish_folder(folder, "ann/tiny", "v1")
    (folder / "metrics.jsonl").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    publish_folder(folder, "ann/tiny", "v2")
    assert messages(repository) == ["initial commit", "Release v1", "Release v2"]
    assert repository.main.files["README.md"] == (folder / "README.md").read_bytes()
    assert "metrics.jsonl" in repository.main.files
    assert repository.tags == {"v1": repository.commits[1].oid, "v2": repository.commits[2].oid}


def test_tag_of_another_commit_stays_there(repository, folder):
    publish_folder(folder, "ann/tiny", "v1")
    (folder / "metrics.jsonl").write_text("{}\n")
    message = error_of(publish_folder, folder, "ann/tiny", "v1")
    assert f"tag 'v1' names another commit, {repository.commits[1].oid[:8]}; main is updated but not tagged" in message
    assert repository.tags == {"v1": repository.commits[1].oid}
    assert message.endswith(f"python training/publish.py {folder} ann/tiny --tag ANOTHER")
    publish_folder(folder, "ann/tiny", "v2")
    assert len(repository.commits) == 3
    assert repository.tags["v2"] == repository.main.oid


def test_card_on_the_hub_names_the_repository(repository, folder):
    assert LOCATION in (folder / "README.md").read_text()
    publish_folder(folder, "ann/tiny")
    card = repository.main.files["README.md"].decode()
    assert 'model="ann/tiny"' in card and LOCATION not in card


def test_quantised_model_is_published_with_its_base(repository, tmp_path):
    model, report = FambaVForImageClassification(tiny_config()), {"model": "shapes", "method": "static", "rounds": 1}
    row = {"name": "ONNX Runtime, int8 static", "top1": 60.0}
    report |= {"dataset": "digits", "split": "train", "validation_images": 9, "calibration_images": 9}
    (tmp_path / "model.onnx").write_bytes(b"model")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    report |= {"precisions": [row], "device": "cpu"}
    files = processor, tmp_path / "model.onnx", report, base_model_of(None, str(tmp_path)), ""
    write_quantized_release(tmp_path / "int8", model.config, *files)
    publish_folder(tmp_path / "int8", "ann/tiny")
    [tag] = repository.tags
    assert re.fullmatch("int8-[0-9a-f]{8}", tag)
    assert repository.main.files["onnx/model_quantized.onnx"] == b"model"
    card = repository.main.files["README.md"].decode()
    assert f"base_model: ann/{tmp_path.name}\n" in card and "base_model_relation: quantized\n" in card
    assert 'folder = "ann/tiny"' in card and 'folder / "onnx/model_quantized.onnx"' in card and LOCATION not in card
