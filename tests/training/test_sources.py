"""A model that is not there: the error says which, by which flag, and what its name was taken for."""

import pytest
from transformers import AutoConfig, ViTImageProcessorPil

from fambav_training.evaluation.scoring import load_classifier
from fambav_training.run.arguments import TrainingArguments
from fambav_training.run.distillation import load_teacher
from fambav_training.run.setup import create_model
from fambav_training.sources import loading
from modeling_fambav import FambaVConfig


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


NAMES = ("outputs/nothing", "./nothing", "/nowhere/at/all")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_model_is_named(name):
    with pytest.raises(OSError, match=rf"^{name}: this Hub id \(or a local folder that does not exist\) cannot be"):
        load_classifier(name, {})


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_checkpoint_is_named_with_its_flag(name):
    with pytest.raises(OSError, match=rf"^--model_name_or_path {name}: this Hub id"):
        create_model(TrainingArguments(model_name_or_path=name), {}, ["cat"])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_teacher_is_named_with_its_flag(name):
    with pytest.raises(OSError, match=rf"^--teacher_name_or_path {name}: this Hub id"):
        load_teacher("--teacher_name_or_path", name, ViTImageProcessorPil(), ["cat"], "cpu")


def test_a_folder_without_weights_is_called_a_folder(tmp_path):
    FambaVConfig(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=rf"^{tmp_path}: this local folder cannot be loaded: .*model.safetensors"):
        load_classifier(str(tmp_path), {})


def test_other_errors_pass():
    with pytest.raises(ValueError, match="^no model$"), loading("name"):
        raise ValueError("no model")
    with loading("name"):
        AutoConfig.for_model("vit")
