"""What a run is made of: its accelerator, and a model that starts from a checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

import train
from fambav_training.machine import processor
from fambav_training.run import setup
from support.helpers import random_tensor, save_classifier
from support.training_runs import own_process_state


@pytest.fixture(autouse=True)
def fresh_process_state():
    with own_process_state():
        yield


@pytest.mark.parametrize("precision, warns", [("bf16", True), ("no", False)])
def test_bf16_without_its_arithmetic_is_said_to_be_slow(precision, warns, monkeypatch, caplog):
    monkeypatch.setattr(processor, "has_bf16_arithmetic", lambda: False)
    setup.create_accelerator(train.TrainingArguments(mixed_precision=precision, cpu=True))
    assert ("--mixed_precision no is faster" in caplog.text) is warns


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fine_tuning_a_folder_in_half_precision_keeps_float32_weights(tmp_path, dtype):
    start = save_classifier(tmp_path / "start")
    half = AutoModelForImageClassification.from_pretrained(start).to(getattr(torch, dtype))
    half.save_pretrained(start)
    assert json.loads((start / "config.json").read_text())["dtype"] == dtype
    model, _ = setup.create_model(train.TrainingArguments(model_name_or_path=str(start)), {}, ["cat", "dog"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32  # as what it is trained to is saved
    expected = half.float().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("before, after", [("head", "middle"), ("middle", "head"), ("middle", "middle")])
def test_class_token_moves_with_its_position_embedding(tmp_path, before, after):
    save_classifier(tmp_path, cls_token_position=before)
    args, names = train.TrainingArguments(model_name_or_path=str(tmp_path)), ["cat", "dog"]
    given = setup.create_model(args, {}, names)[0].fambav.embeddings
    moved = setup.create_model(args, {"cls_token_position": after}, names)[0].fambav.embeddings
    assert moved.config.cls_token_position == after
    pixel_values = random_tensor(1, 3, *given.config.image_height_width, seed=0)
    (tokens, index), (expected, index_before) = moved(pixel_values), given(pixel_values)
    assert index == (0 if after == "head" else given.config.num_patches // 2)
    assert torch.equal(tokens[:, index], expected[:, index_before])
    tokens, expected = ([*values[0].unbind()] for values in (tokens, expected))
    del tokens[index], expected[index_before]
    assert all(torch.equal(*pair) for pair in zip(tokens, expected, strict=True))
