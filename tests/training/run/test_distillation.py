"""Distillation: a teacher that stays as it is, runs that stop and resume, recovery, and errors."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import train
from fambav_training.cli import parse_arguments
from fambav_training.data.augmentation import Targets, mixed_cross_entropy
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.scoring import Scorer, load_classifier
from fambav_training.run import distillation, setup, trainer
from fambav_training.run.arguments import TrainingArguments, recipe_of
from fambav_training.run.checkpointing import CheckpointError
from fambav_training.run.distillation import Teacher, distillation_loss
from modeling_fambav import FambaVForImageClassification, FambaVModel
from support.helpers import noise, random_tensor, tiny_config
from support.training_runs import FLAGS, own_process_state, read_metrics, read_results, train_here, without_time

WEIGHTS = "model.safetensors"
GEOMETRY = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "state_size")
# A model is trained for a moment, fusion is switched on in it, and everything that is random is on.
START = {**FLAGS, "max_train_samples": 96, "max_eval_samples": 60, "max_train_steps": 6, "num_hidden_layers": 2}
START |= {"hidden_size": 16, "patch_size": 4, "fusion_strategy": "none", "fusion_tokens": None}
RUN = {**START, **dict.fromkeys(GEOMETRY), "fusion_strategy": "upper", "fusion_tokens": 1, "drop_path_rate": 0.1}
RUN |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "mixup_alpha": 0.8}
RUN |= {"random_erasing_prob": 0.25, "logging_steps": 1}
DISTILLED = {**RUN, "distillation_weight": 0.5}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A classifier that was trained without fusion."""
    folder = tmp_path_factory.mktemp("start") / "model"
    train_here(folder, **START)
    return folder


# ---- the teacher ----


def test_teacher_scores_without_fusion_and_gets_no_gradient(start):
    config = AutoModelForImageClassification.from_pretrained(start).config
    processor = ViTImageProcessorPil.from_pretrained(start)
    names = [config.id2label[index] for index in range(10)]
    teacher = distillation.load_teacher("--flag", str(start), processor, names, torch.device("cpu"))
    assert teacher.model.config.fusion_strategy == "none" and not teacher.model.training
    images = random_tensor(3, 3, 8, 8, seed=0)
    student = AutoModelForImageClassification.from_pretrained(start)
    logits = student(pixel_values=images).logits
    scores = teacher(images)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, logits, rtol=0, atol=1e-6)
    distillation_loss(2 * logits, scores, 2.0).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    for parameter in teacher.model.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def test_classes_of_the_teacher_are_matched_by_name(start, tmp_path):
    shutil.copytree(start, tmp_path / "teacher")
    config = json.loads((start / "config.json").read_text())
    names = [str((index + 3) % 10) for index in range(10)]  # what its index means
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    images = random_tensor(3, 3, 8, 8, seed=0)
    processor, labels = ViTImageProcessorPil.from_pretrained(start), [str(index) for index in range(10)]
    arguments = processor, labels, torch.device("cpu")
    own, renamed = (
        distillation.load_teacher("--flag", str(folder), *arguments)(images)
        for folder in (start, tmp_path / "teacher")
    )
    for index, name in enumerate(names):
        torch.testing.assert_close(renamed[:, int(name)], own[:, index])


def test_fingerprint_is_that_of_the_weights():
    models = [FambaVForImageClassification(tiny_config()) for _ in range(2)]
    first, second = (Teacher(model, [0, 1]).fingerprint() for model in models)
    assert first != second
    models[1].load_state_dict(models[0].state_dict())
    assert Teacher(models[1], [1, 0]).fingerprint() == first


# ---- runs ----


def test_loss_of_a_run_is_the_mix_of_the_two(start, tmp_path, monkeypatch):
    seen = []

    def record(logits, targets: Targets, label_smoothing):
        seen.append(mixed_cross_entropy(logits, targets, label_smoothing).item())
        return mixed_cross_entropy(logits, targets, label_smoothing)

    def record_distillation(*arguments):
        seen.append(distillation_loss(*arguments).item())
        assert arguments[2:] == (3.0, "standardized", None)  # the teacher has seen the mixed images itself
        return distillation_loss(*arguments)

    monkeypatch.setattr(trainer, "mixed_cross_entropy", record)
    monkeypatch.setattr(trainer, "distillation_loss", record_distillation)
    flags = {**RUN, "gradient_accumulation_steps": 1, "max_train_steps": 2, "model_name_or_path": start}
    flags |= {"distillation_weight": 0.7, "distillation_temperature": 3, "distillation_loss": "standardized"}
    train_here(tmp_path / "out", **flags)
    logged = [record["train_loss"] for record in read_metrics(tmp_path / "out") if "train_loss" in record]
    assert logged == pytest.approx([0.3 * seen[0] + 0.7 * seen[1], 0.3 * seen[2] + 0.7 * seen[3]])
    assert min(seen) > 1e-3  # otherwise the comparison would say little


def test_weight_zero_is_no_distillation_bit_by_bit(start, tmp_path, monkeypatch):
    train_here(tmp_path / "plain", **RUN, model_name_or_path=start)
    train_here(tmp_path / "distilled", **DISTILLED, model_name_or_path=start)
    monkeypatch.setattr(setup, "load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    flags = {**RUN, "distillation_weight": 0, "distillation_temperature": 5}
    train_here(tmp_path / "zero", **flags, model_name_or_path=start)
    plain, zero, distilled = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "zero", "distilled"))
    assert zero == plain != distilled


def test_given_teacher_is_the_one_that_is_used(start, tmp_path):
    train_here(tmp_path / "other", **{**START, "seed": 1, "max_train_steps": 12})
    common = {**DISTILLED, "model_name_or_path": start}
    train_here(tmp_path / "default", **common)
    train_here(tmp_path / "same", **common, teacher_name_or_path=start)
    train_here(tmp_path / "another", **common, teacher_name_or_path=tmp_path / "other")
    default, same, another = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("default", "same", "another"))
    assert default == same != another
    # The teacher is no part of what the run leaves
    assert load_file(tmp_path / "default" / WEIGHTS).keys() == load_file(start / WEIGHTS).keys()


@pytest.mark.parametrize("precision, is_autocast", [("no", False), ("bf16", True)])
def test_teacher_works_in_the_precision_of_the_student(start, tmp_path, monkeypatch, precision, is_autocast):
    score, seen = Teacher.__call__, []

    def record(self, pixel_values):
        seen.append(torch.is_autocast_enabled("cpu"))
        return score(self, pixel_values)

    monkeypatch.setattr(Teacher, "__call__", record)
    flags = {**DISTILLED, "max_train_steps": 1, "mixed_precision": precision, "model_name_or_path": start}
    assert math.isfinite(train_here(tmp_path / "out", **flags)["train_loss"])
    assert seen[0] is False and set(seen[1:]) == {is_autocast}  # the first call compiles the kernels


def test_release_records_the_distillation(start, tmp_path):
    train_here(tmp_path / "out", **DISTILLED, model_name_or_path=start)
    arguments, card = read_results(tmp_path / "out")["arguments"], (tmp_path / "out" / "README.md").read_text()
    assert (arguments["distillation_weight"], arguments["distillation_temperature"]) == (0.5, 2.0)
    assert f"Started from the weights of `{start}`" in card
    card = " ".join(card.split())
    assert (
        f"Started from the weights of `{start}`. 50% of the loss came from a teacher, `{start}` without fusion" in card
    )
    assert "Started from" not in (start / "README.md").read_text()


# ---- stopping and resuming ----


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    train_here(folder, **DISTILLED, model_name_or_path=start, checkpointing_steps=1)
    return folder


@pytest.mark.parametrize("step", [1, 3, 4])  # in an epoch, and at its end
def test_resumed_run_ends_as_the_whole_one(start, saved, tmp_path, step):
    shutil.copytree(saved / "checkpoints" / f"step_{step:06d}", tmp_path / "out" / "checkpoints" / f"step_{step:06d}")
    shutil.copy(saved / "metrics.jsonl", tmp_path / "out")
    train_here(tmp_path / "out", **DISTILLED, model_name_or_path=start, resume_from_checkpoint="latest")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert without_time(read_metrics(tmp_path / "out")) == without_time(read_metrics(saved))


def test_teacher_is_in_no_checkpoint(start, saved):
    plain = sum(weight.numel() for weight in load_file(start / WEIGHTS).values())
    folder = saved / "checkpoints" / "step_000006"
    assert sum(weight.numel() for weight in load_file(folder / WEIGHTS).values()) == plain
    average = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
    assert sum(weight.numel() for weight in average.values()) == plain + 1  # and the number of updates


@pytest.mark.parametrize(
    "changed",
    [
        {"distillation_weight": 0.4},
        {"distillation_weight": 0},
        {"distillation_temperature": 3},
        {"distillation_loss": "standardized"},
    ],
    ids=str,
)
def test_flags_are_binding(start, saved, tmp_path, changed):
    shutil.copytree(saved, tmp_path / "out")
    with pytest.raises(CheckpointError, match="made with --distillation_"):
        flags = {**DISTILLED, "model_name_or_path": start, **changed}
        train_here(tmp_path / "out", **flags, resume_from_checkpoint="latest")


def test_teacher_that_was_replaced_is_refused(start, tmp_path):
    shutil.copytree(start, tmp_path / "teacher")
    flags = {**DISTILLED, "model_name_or_path": start, "teacher_name_or_path": tmp_path / "teacher"}
    train_here(tmp_path / "out", **{**flags, "checkpointing_steps": 3})
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_000006")
    train_here(tmp_path / "teacher", **{**START, "seed": 1})
    with pytest.raises(CheckpointError, match="made with another teacher, the weights of .*teacher have changed"):
        train_here(tmp_path / "out", **flags, resume_from_checkpoint="latest")


def test_flags_of_distillation_do_not_bind_runs_without_it():
    def recipe(*words: str):
        return recipe_of(*parse_arguments(TrainingArguments, "", words))

    assert recipe("--distillation_temperature", "5") == recipe()
    assert not any("distillation" in name or "teacher" in name for name in recipe())  # checkpoints older than them
    assert recipe("--distillation_weight", "0.5")["distillation_temperature"] == 2.0


# ---- recovery ----


def score(folder: Path, **fusion) -> float:
    """Top-1 accuracy in percent on the validation split of the digits."""
    with own_process_state():
        model, processor = load_classifier(str(folder), fusion)
        return Scorer(model, processor, load_labeled_images("digits"), Accelerator(cpu=True), 60).score()["top1"]


@pytest.mark.slow
def test_two_epochs_recover_most_of_what_fusion_cost(tmp_path):
    start = {**FLAGS, "max_train_samples": None, "fusion_strategy": "none", "fusion_tokens": None}
    train_here(tmp_path / "start", **{**start, "max_train_steps": 88})
    fusion = {"fusion_strategy": "upper", "fusion_tokens": 4}
    recovery = {**start, **dict.fromkeys(GEOMETRY), **fusion, "max_train_steps": 33, "learning_rate": 0.005}
    recovery |= {"model_name_or_path": tmp_path / "start", "distillation_weight": 0.5}
    unfused, fused = score(tmp_path / "start"), score(tmp_path / "start", **fusion)
    recovered = train_here(tmp_path / "out", **recovery)["top1"]
    assert fused < unfused - 20  # otherwise there would be nothing to recover
    assert recovered > (unfused + fused) / 2
    assert score(tmp_path / "out") == recovered


# ---- errors ----


def assert_refused(tmp_path: Path, monkeypatch, expected: list[str], **changes) -> None:
    """The run ends before training with an error that has these words, and writes nothing."""
    monkeypatch.setattr(train.Trainer, "train", lambda *_: pytest.fail("training started"))
    with pytest.raises(ValueError) as error:
        train_here(tmp_path / "out", **{**DISTILLED, **changes})
    for word in expected:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"distillation_weight": 1.5}, ["--distillation_weight 1.5", "[0, 1]"]),
        ({"distillation_weight": -0.1}, ["--distillation_weight -0.1", "[0, 1]"]),
        ({"distillation_temperature": 0}, ["--distillation_temperature 0.0", "> 0"]),
        ({"distillation_temperature": "nan"}, ["--distillation_temperature nan", "> 0"]),
        ({"distillation_weight": 0, "teacher_name_or_path": "x"}, ["--teacher_name_or_path x", "above 0"]),
        ({}, ["--distillation_weight 0.5", "--model_name_or_path", "--teacher_name_or_path", "--teacher_views"]),
        ({"distillation_loss": "mse"}, ["--distillation_loss mse", "['kl', 'standardized']"]),
        ({"distillation_weight": 0, "teacher_views": "x"}, ["--teacher_views x", "above 0"]),
        ({"teacher_views": "x", "teacher_name_or_path": "y"}, ["--teacher_views x", "no --teacher_name_or_path"]),
        ({"teacher_views": "x"}, ["--teacher_views x", "--random_erasing_prob 0, not 0.25"]),
        (
            {"teacher_views": "x", "random_erasing_prob": 0},
            ["x: expected teacher_views.json", "store_teacher_views.py"],
        ),
    ],
    ids=str,
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, changes, expected):
    assert_refused(tmp_path, monkeypatch, expected, **changes)


def write_model(folder: Path, model_class=FambaVForImageClassification, mean: float = 0.5, **fields) -> Path:
    side = fields.get("image_size", 8)
    config = tiny_config(**{"image_size": side, "patch_size": 4, "fusion_tokens": 1, "num_labels": 10, **fields})
    model_class(config).save_pretrained(folder)
    size = {"height": side, "width": side}
    ViTImageProcessorPil(size=size, image_mean=[mean] * 3).save_pretrained(folder)
    return folder


TEACHERS = {
    "fewer classes": ({"num_labels": 7}, ["7 classes", "10 of the data"]),
    "other classes": ({"id2label": {index: f"animal {index}" for index in range(10)}}, ["class '0'", "animal 1"]),
    "no classifier": ({"model_class": FambaVModel}, ["trained classifier", "classifier."]),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_teacher_that_does_not_fit_is_refused(start, tmp_path, monkeypatch, case):
    changes, expected = TEACHERS[case]
    if "id2label" in changes:
        changes = {**changes, "label2id": {name: index for index, name in changes["id2label"].items()}}
    folder = write_model(tmp_path / "teacher", **changes)
    expected = [f"--teacher_name_or_path {folder}", *expected]
    assert_refused(tmp_path, monkeypatch, expected, model_name_or_path=start, teacher_name_or_path=folder)


def test_start_without_a_classifier_is_no_teacher(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "start", FambaVModel)
    expected = [f"--model_name_or_path {folder}", "trained classifier"]
    assert_refused(tmp_path, monkeypatch, expected, model_name_or_path=folder)


def write_vit(folder: Path, side: int, **processing) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=side, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    config.id2label = {index: str(9 - index) for index in range(10)}  # the digits, the other way round
    config.label2id = {name: index for index, name in config.id2label.items()}
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}, **processing).save_pretrained(folder)
    return model


def test_teacher_of_another_kind_sees_images_as_its_own_processor_makes_them(tmp_path):
    processing = {"resample": 3, "image_mean": [0.3, 0.4, 0.6], "image_std": [0.2, 0.3, 0.4]}
    vit = write_vit(tmp_path / "vit", 20, **processing)
    students = ViTImageProcessorPil(size={"height": 8, "width": 8})
    names, image = [str(index) for index in range(10)], noise(seed=3)
    teacher = distillation.load_teacher("--flag", str(tmp_path / "vit"), students, names, torch.device("cpu"))
    scores = teacher(students(image, return_tensors="pt")["pixel_values"])
    own = ViTImageProcessorPil.from_pretrained(tmp_path / "vit")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scores, vit(pixel_values=own).logits.flip(-1).detach(), rtol=0, atol=0.01)
    assert scores.std() > 0.03  # otherwise the comparison would say little


def test_run_with_a_teacher_of_another_kind(start, tmp_path):
    write_vit(tmp_path / "vit", 12)
    results = train_here(
        tmp_path / "out", **DISTILLED, model_name_or_path=start, teacher_name_or_path=tmp_path / "vit"
    )
    assert math.isfinite(results["train_loss"])


def test_teacher_with_code_of_its_own_needs_permission(start, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModelForImageClassification": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_kind", "auto_map": auto_map}))
    (folder / "own_code.py").write_text("raise SystemExit('the code has run')\n")
    expected = [f"--teacher_name_or_path {folder}: comes with code of its own", "--teacher_trust_remote_code"]
    assert_refused(tmp_path, monkeypatch, expected, model_name_or_path=start, teacher_name_or_path=folder)


def test_run_does_not_replace_its_teacher(start, monkeypatch):
    before = (start / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="--output_dir .*expected another folder than the teacher's"):
        train_here(start, **DISTILLED, model_name_or_path=start)
    assert (start / WEIGHTS).read_bytes() == before
