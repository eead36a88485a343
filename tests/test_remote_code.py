"""A saved folder carries its own code: it loads where this package, and even numba, is not installed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.dynamic_module_utils import get_imports
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVForImageClassification
from support.child_process import REPOSITORY, run_python
from support.helpers import tiny_config

LABELS = {0: "ant", 1: "bee", 2: "cat"}
CODE_FILES = {path.name for path in (REPOSITORY / "modeling_fambav").glob("*.py")} - {"__init__.py"}


@dataclass
class Loaded:
    """What a process without this package read from the folder."""

    report: dict[str, Any]
    tensors: dict[str, Tensor]
    relabeled: dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A classifier and its image processor, saved; beside them, inputs."""
    torch.manual_seed(0)
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    config = tiny_config(cls_token_position="middle", fusion_order="appended", fusion_scale_time_step=True, **labels)
    model = FambaVForImageClassification(config)
    for parameter in model.parameters():  # away from the values that a new model has
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "image": torch.from_numpy(image)}
    save_file(inputs, folder.parent / "inputs.safetensors")
    return folder


def load_elsewhere(saved: Path, place: Path, *blocked: str) -> Loaded:
    script = REPOSITORY / "tests" / "support" / "load_remote_code.py"
    process = run_python("-I", script, saved, place, *blocked, cwd=place, HF_HOME=str(place / "hf_home"))
    assert process.returncode == 0, process.stderr
    return Loaded(
        json.loads((place / "report.json").read_text()),
        load_file(place / "tensors.safetensors"),
        load_file(place / "relabeled.safetensors"),
    )


@pytest.fixture(scope="module")
def without_numba(saved, tmp_path_factory) -> Loaded:
    return load_elsewhere(saved, tmp_path_factory.mktemp("without_numba"), "modeling_fambav", "numba", "llvmlite")


@pytest.fixture(scope="module")
def with_numba(saved, tmp_path_factory) -> Loaded:
    return load_elsewhere(saved, tmp_path_factory.mktemp("with_numba"), "modeling_fambav")


@pytest.fixture(params=["without_numba", "with_numba"])
def loaded(request) -> Loaded:
    return request.getfixturevalue(request.param)


def test_only_safetensors_and_readable_files_are_written(saved):
    others = {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert {path.name for path in saved.iterdir()} == CODE_FILES | others


@pytest.mark.slow
def test_code_comes_from_the_folder(without_numba, with_numba):
    for loaded in (without_numba, with_numba):
        assert loaded.report["code_from"] == ["transformers_modules"]
        assert loaded.report["class_names"] == ["FambaVConfig", "FambaVForImageClassification", "FambaVModel"]
    assert (without_numba.report["backend"], without_numba.report["imported"]) == ("torch", [])
    assert (with_numba.report["backend"], with_numba.report["imported"]) == ("numba", ["numba"])


@pytest.mark.slow
def test_numbers_are_those_of_the_package(saved, loaded):
    pixel_values = load_file(saved.parent / "inputs.safetensors")["pixel_values"]
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(saved)(pixel_values).logits
        last_hidden_state = AutoModel.from_pretrained(saved)(pixel_values).last_hidden_state
    assert logits.abs().max() > 0.1
    torch.testing.assert_close(loaded.tensors["logits"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.tensors["last_hidden_state"], last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_pipeline_answers_as_with_the_package(saved, loaded):
    image = Image.fromarray(load_file(saved.parent / "inputs.safetensors")["image"].numpy())
    classify = pipeline("image-classification", model=str(saved))
    torch.testing.assert_close(loaded.tensors["processed"], classify.preprocess(image)["pixel_values"])
    answers, expected = loaded.report["answers"], classify(image, top_k=3)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]
    assert [answer["score"] for answer in answers] == pytest.approx([answer["score"] for answer in expected], abs=1e-5)


@pytest.mark.slow
def test_config_survives(loaded):
    assert {int(index): name for index, name in loaded.report["id2label"].items()} == LABELS
    assert loaded.report["sequence_lengths"] == [17, 15, 13]


@pytest.mark.slow
def test_code_is_not_run_without_trust(loaded):
    refusals = loaded.report["refusals"]
    assert set(refusals) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "pipeline"}
    for message in refusals.values():
        assert "trust_remote_code=True" in message


def check_relabeled(relabeled: dict[str, Tensor], saved: Path) -> None:
    """A new head, initialised as in a new model, on the weights of the folder."""
    before = load_file(saved / "model.safetensors")
    head = {"classifier.weight", "classifier.bias"}
    assert set(relabeled) == set(before)
    for name in set(before) - head:
        assert torch.equal(relabeled[name], before[name]), name
    assert relabeled["classifier.weight"].shape == (7, 32)
    assert 0.015 < relabeled["classifier.weight"].std() < 0.025  # initializer_range is 0.02
    assert torch.equal(relabeled["classifier.bias"], torch.zeros(7))


@pytest.mark.slow
def test_new_labels_get_a_new_head_in_remote_code(saved, loaded):
    check_relabeled(loaded.relabeled, saved)


def test_new_labels_get_a_new_head_in_the_package(saved):
    model = FambaVForImageClassification.from_pretrained(saved, num_labels=7, ignore_mismatched_sizes=True)
    check_relabeled(model.state_dict(), saved)


@pytest.mark.slow
def test_import_is_cheap():
    # Compiling or loading kernels is for the first scan. datasets, accelerate and others are for training.
    code = "import sys, modeling_fambav; print(*sys.modules)"
    process = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    modules = set(process.stdout.split())
    assert "modeling_fambav.modeling_fambav" in modules
    assert not modules & {"numba", "llvmlite", "mamba_ssm", "datasets", "sklearn", "matplotlib"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "modeling_fambav").glob("*.py")), ids=lambda path: path.name)
def test_remote_code_needs_no_package_of_a_backend(path):
    """transformers refuses to load a folder if a package is missing that one of its files imports outside of `try`."""
    assert set(get_imports(path)) - sys.stdlib_module_names <= {"huggingface_hub", "numpy", "torch", "transformers"}
