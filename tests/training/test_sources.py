"""A model that is not there: the error says which, by which flag, and what its name was taken for."""

import pytest
import torch
from transformers import AutoConfig, ViTImageProcessorPil

from fambav_training.evaluation.scoring import load_classifier
from fambav_training.run.arguments import TrainingArguments
from fambav_training.run.distillation import load_teacher
from fambav_training.run.setup import create_model
from fambav_training.sources import loading
from support.helpers import save_classifier


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


LOADERS = {
    "": lambda name: load_classifier(name, {}),
    "--model_name_or_path ": lambda name: create_model(TrainingArguments(model_name_or_path=name), {}, ["cat"]),
    "--teacher_name_or_path ": lambda name: load_teacher(
        "--teacher_name_or_path", name, ViTImageProcessorPil(), ["cat"], torch.device("cpu")
    ),
}


@pytest.mark.parametrize("flag", LOADERS)
@pytest.mark.parametrize("name", ["outputs/nothing", "./nothing", "/nowhere/at/all"])
def test_what_is_missing_is_named(name, flag):
    with pytest.raises(OSError, match=rf"^{flag}{name}: this Hub id \(or a local folder that does not exist\) "):
        LOADERS[flag](name)


@pytest.mark.parametrize("flag", LOADERS)
@pytest.mark.parametrize("damage", ["without weights", "with half of them", "without an image processor"])
def test_what_a_folder_lacks_is_named(tmp_path, flag, damage):
    folder = save_classifier(tmp_path, id2label={0: "cat"}, label2id={"cat": 0})
    weights = folder / "model.safetensors"
    if damage == "without weights":
        weights.unlink()
    elif damage == "with half of them":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=rf"^{flag}{folder}: this local folder cannot be loaded: ") as raised:
        LOADERS[flag](str(folder))
    assert "\n" not in str(raised.value)


def test_other_errors_pass():
    with pytest.raises(ValueError, match="^no model$"), loading("name"):
        raise ValueError("no model")
    with loading("name"):
        AutoConfig.for_model("vit")
