"""The training script: what a run leaves, that it can be repeated, and that it fails early and clearly."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import train
from fambav_training.cli import parse_arguments
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.metrics import evaluate
from fambav_training.run import loaders, setup
from support.child_process import REPOSITORY, run_python
from support.training_runs import (
    FLAGS,
    command_line,
    own_process_state,
    read_results,
    run_in_two_processes,
    train_here,
)

NUM_STEPS = FLAGS["max_train_steps"]
# For runs that start from a checkpoint.
NO_GEOMETRY = dict.fromkeys(
    ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "state_size", "fusion_tokens")
)
SECRET = "hf_verysecrettoken"


@pytest.fixture(autouse=True)
def fresh_process_state():
    with own_process_state():
        yield


def write_half_of_the_flags(path: Path) -> dict[str, Any]:
    """Every second flag goes into a YAML file; returns the others, for the command line."""
    in_file = dict(list(FLAGS.items())[::2])
    path.write_text("".join(f"{name}: {value}\n" for name, value in in_file.items()))
    return {name: value for name, value in FLAGS.items() if name not in in_file}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder that the script leaves, called in this process. Half of the flags are in a YAML file."""
    folder = tmp_path_factory.mktemp("trained")
    on_command_line = {**write_half_of_the_flags(folder / "run.yaml"), "config": folder / "run.yaml"}
    with pytest.MonkeyPatch.context() as patch, own_process_state(), contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", SECRET)
        patch.setattr(sys, "argv", ["train.py", "--output_dir", "runs/first", *command_line(**on_command_line)])
        started = time.process_time()
        train.main()
        processor_seconds = time.process_time() - started
    assert 0.01 * processor_seconds < read_results(folder / "runs" / "first")["processor_seconds"] < processor_seconds
    assert "runs/first: top-1" in out.getvalue() and SECRET not in out.getvalue()
    assert [path.name for path in (folder / "runs").iterdir()] == ["first"]
    return folder / "runs" / "first"


# ---- what a run leaves ----


def test_run_leaves_every_file(trained):
    code = {path.name for path in (REPOSITORY / "modeling_fambav").glob("*.py")} - {"__init__.py"}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {path.name for path in trained.iterdir()} == code | others | {
        "metrics.jsonl",
        "all_results.json",
        "training.png",
    }
    for name in code:
        assert (trained / name).read_text() == (REPOSITORY / "modeling_fambav" / name).read_text()


def test_results_are_those_of_the_contract(trained):
    results = read_results(trained)
    model = AutoModelForImageClassification.from_pretrained(trained)
    assert results["steps"] == NUM_STEPS
    assert results["seed"] == 0
    assert results["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert results["sequence_lengths"] == model.config.sequence_lengths == [17, 14, 11]
    for kind in ("", "ema_"):
        assert 0 <= results[f"{kind}top1"] <= results[f"{kind}top5"] <= 100
    num_images = NUM_STEPS * FLAGS["per_device_train_batch_size"]
    assert results["images_per_second"] == pytest.approx(num_images / results["train_seconds"])
    # Several cores may work; the fixture has the lower bound, which this process may miss while it waits for others
    assert results["processor_seconds"] < 2 * os.cpu_count() * results["train_seconds"]
    assert 2**27 < results["peak_memory_bytes"] < 2**36  # an interpreter with torch takes more than 128 MiB
    assert results["device"].startswith("cpu: ")
    assert results["scan_backend"] == "numba"
    assert results["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "accelerate", "datasets"} <= set(results["versions"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    if head.returncode == 0:
        assert results["git_commit"].removesuffix("-dirty") == head.stdout.strip()
    else:
        assert results["git_commit"] is None


def test_metrics_have_a_line_per_epoch(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]  # of 8 batches
    assert [record["step"] for record in records] == [8, 16, 24]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)  # the end of the cosine
    seconds = [record["train_seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[-1] == read_results(trained)["train_seconds"]


def test_pipeline_scores_what_the_run_reports(trained):
    classify = pipeline("image-classification", model=str(trained))
    images = load_labeled_images("digits")
    truths = [images.label_names[label] for label in images.validation[images.label_column]]
    answers = classify(list(images.validation[images.image_column]), top_k=5, batch_size=60)
    ranked = [[answer["label"] for answer in answer_of_one] for answer_of_one in answers]
    results = read_results(trained)
    assert results["top1"] == pytest.approx(100 * np.mean([truth == names[0] for truth, names in zip(truths, ranked)]))
    assert results["top5"] == pytest.approx(100 * np.mean([truth in names for truth, names in zip(truths, ranked)]))
    assert results["top1"] > 30  # otherwise the comparison would say little


def test_no_token_appears_in_the_folder(trained):
    for path in trained.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path.name


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_run(trained, tmp_path):
    on_command_line = write_half_of_the_flags(tmp_path / "run.yaml")
    process = run_python(
        *("-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", REPOSITORY / "training" / "train.py"),
        *("--config", tmp_path / "run.yaml", "--output_dir", "runs/first", *command_line(**on_command_line)),
        cwd=tmp_path,
        HF_TOKEN=SECRET,
    )
    assert process.returncode == 0, process.stderr
    assert "runs/first: top-1" in process.stdout and SECRET not in process.stdout + process.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    folder = tmp_path / "runs" / "first"
    assert {path.name for path in folder.iterdir()} == {path.name for path in trained.iterdir()}
    for path in folder.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path.name
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


# ---- repeating and varying a run ----


def test_same_seed_gives_the_same_weights_bit_by_bit(trained, tmp_path):
    results = train_here(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    first = read_results(trained)
    for name in ("top1", "top5", "ema_top1", "ema_top5", "train_loss"):
        assert results[name] == first[name]

    train_here(tmp_path / "other", seed=1, max_train_steps=1)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (trained / "model.safetensors").read_bytes()


def write_image_folder(folder: Path, counts: dict[str, int], split: str = "train") -> None:
    """Grey images, one shade per label, in the layout folder/split/label/number.png."""
    for shade, (label, count) in enumerate(counts.items()):
        (folder / split / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((9, 7), 60 * shade + i, np.uint8)
            Image.fromarray(pixels).save(folder / split / label / f"{i:03}.png")


def test_start_from_a_checkpoint_with_other_labels(trained, tmp_path):
    write_image_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
    results = train_here(
        tmp_path / "out",
        dataset_name=tmp_path / "pets",
        model_name_or_path=trained,
        learning_rate=0,  # what was loaded is still there at the end
        max_train_steps=1,
        per_device_train_batch_size=16,
        **{**NO_GEOMETRY, "fusion_tokens": 1},
    )
    before = AutoModelForImageClassification.from_pretrained(trained).state_dict()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.label2id == {"cat": 0, "dog": 1}
    for name, tensor in model.state_dict().items():
        if name.startswith("classifier."):
            assert tensor.shape[0] == 2 and tensor.isfinite().all()
        else:
            assert torch.equal(tensor, before[name]), name
    assert results["sequence_lengths"] == [17, 16, 15]
    assert results["validation_images"] == 8
    assert results["top5"] == 100  # of two classes


def test_start_from_a_checkpoint_with_the_same_labels_keeps_the_classifier(trained, tmp_path):
    results = train_here(tmp_path / "out", model_name_or_path=trained, learning_rate=0, max_train_steps=1)
    assert (results["top1"], results["top5"]) == (read_results(trained)["top1"], read_results(trained)["top5"])


def test_first_samples_of_a_sorted_dataset_are_of_all_classes(tmp_path):
    write_image_folder(tmp_path / "pets", {"cat": 40, "dog": 40})
    write_image_folder(tmp_path / "pets", {"cat": 20, "dog": 20}, split="test")
    images = load_labeled_images(str(tmp_path / "pets"), validation_split="test")
    flags = command_line(image_size=8, patch_size=4, max_train_samples=30, max_eval_samples=15)
    args, overrides = parse_arguments(train.TrainingArguments, "", [*flags, "--per_device_train_batch_size", "10"])
    _, processor = setup.create_model(args, overrides, images.label_names)
    for loader, expected in zip(loaders.create_loaders(args, images, processor, Accelerator(cpu=True)), (30, 15)):
        assert len(loader.dataset) == expected
        assert set(loader.dataset.labels.tolist()) == {0, 1}


def test_steps_count_optimizer_steps(tmp_path):
    results = train_here(
        tmp_path / "out",
        max_train_samples=100,
        max_train_steps=None,
        num_train_epochs=2,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=3,
    )
    assert results["steps"] == 8  # 10 batches make 4 steps, the last one of a single batch
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["learning_rate"] == pytest.approx(0, abs=1e-9)


# Six batches, three for each process; the last one is filled up with images that were scored before.
UNEVEN = {"max_eval_samples": 41, "per_device_eval_batch_size": 8}


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> tuple[Path, str]:
    """The folder that two processes leave, and what they print."""
    folder = tmp_path_factory.mktemp("trained_by_two") / "out"
    process = run_in_two_processes(folder, max_train_steps=12, **UNEVEN)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.mark.slow
def test_two_processes_score_every_image_once(trained_by_two):
    folder, _ = trained_by_two
    results = read_results(folder)
    assert results["num_processes"] == 2
    assert results["images_per_second"] == pytest.approx(12 * 2 * 64 / results["train_seconds"])
    assert results["validation_images"] == 41

    # The same weights on the same images in this one process.
    model = AutoModelForImageClassification.from_pretrained(folder)
    args, overrides = parse_arguments(train.TrainingArguments, "", command_line(**{**FLAGS, **UNEVEN}))
    images = load_labeled_images("digits")
    _, processor = setup.create_model(args, overrides, images.label_names)
    accelerator = Accelerator(cpu=True)
    _, loader = loaders.create_loaders(args, images, processor, accelerator)
    scores = evaluate(model, loader, processor, accelerator)
    assert scores == {"top1": results["top1"], "top5": results["top5"]}


@pytest.mark.slow
def test_one_of_two_processes_prints_the_result(trained_by_two):
    assert trained_by_two[1].count("top-1") == 1


@pytest.mark.slow
def test_too_few_images_for_two_processes(tmp_path):
    process = run_in_two_processes(tmp_path / "out", max_train_samples=100)  # one batch, for one of the two
    assert process.returncode == 1
    assert "error: --per_device_train_batch_size 64" in process.stderr
    assert not (tmp_path / "out").exists()


# ---- failing ----


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A folder that an earlier run left."""
    folder = tmp_path / "old_run"
    folder.mkdir()
    (folder / "all_results.json").write_text("{}")
    (folder / "model.safetensors").write_text("old weights")
    return folder


@pytest.mark.parametrize(  # before saving, and amid it
    "failing", ["fambav_training.run.trainer.evaluate", "fambav_training.release.saving.create_card"]
)
def test_failing_run_leaves_the_old_folder_alone(old_run, monkeypatch, failing):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train_here(old_run, max_train_steps=1)
    assert [path.name for path in old_run.parent.iterdir()] == ["old_run"]
    assert {path.name for path in old_run.iterdir()} == {"all_results.json", "model.safetensors", "metrics.jsonl"}
    assert (old_run / "model.safetensors").read_text() == "old weights"


def test_run_replaces_the_old_folder(old_run):
    train_here(old_run, max_train_steps=1)
    assert read_results(old_run)["steps"] == 1
    AutoModelForImageClassification.from_pretrained(old_run)


def test_run_deletes_nothing_that_is_not_an_old_run(tmp_path):
    (tmp_path / "outputs" / "other_run").mkdir(parents=True)
    (tmp_path / "outputs" / "other_run" / "model.safetensors").write_text("other weights")
    try:
        train_here(tmp_path / "outputs", max_train_steps=1)
    except ValueError as error:
        assert "--output_dir" in str(error)
    assert (tmp_path / "outputs" / "other_run" / "model.safetensors").read_text() == "other weights"


BAD_FLAGS = [
    ({"learning_rat": 1}, ["--learning_rat", "'--learning_rate'"]),
    ({"config": "missing.yaml"}, ["missing.yaml"]),
    ({"seed": "one"}, ["--seed", "one"]),
    ({"seed": -1}, ["--seed -1", "0 to 2**32 - 1"]),
    ({"num_train_epochs": 0}, ["--num_train_epochs 0", ">= 1"]),
    ({"max_train_steps": 0}, ["--max_train_steps 0", ">= 1"]),
    ({"max_eval_samples": 0}, ["--max_eval_samples 0", ">= 1"]),
    ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps 0", ">= 1"]),
    ({"learning_rate": -0.1}, ["--learning_rate -0.1", ">= 0"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan"]),
    ({"num_channels": 1}, ["--num_channels 1", "expected 3"]),
    ({"warmup_ratio": 1}, ["--warmup_ratio 1", "[0, 1)"]),
    ({"label_smoothing": -0.1}, ["--label_smoothing -0.1", "[0, 1)"]),
    ({"mixed_precision": "fp32"}, ["--mixed_precision fp32", "bf16"]),
    ({"lr_scheduler_type": "cosin"}, ["cosin", "'cosine'"]),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["--lr_scheduler_type", "reduce_lr_on_plateau"]),
    ({"lr_scheduler_type": "warmup_stable_decay"}, ["--lr_scheduler_type", "warmup_stable_decay"]),
    ({"per_device_train_batch_size": 513}, ["--per_device_train_batch_size 513", "512"]),
    ({"fusion_tokens": 0}, ["fusion_tokens=0", "none"]),
    ({"fusion_strategy": "uper"}, ["fusion_strategy", "uper", "upper"]),
    ({"fusion_schedule": [1, 2]}, ["fusion_schedule", "[1, 2]"]),
    ({"image_size": 9}, ["image_size=9", "patch_size=2"]),
    ({"dataset_name": "./missing"}, ["--dataset_name", "missing"]),
    ({"train_split": "training"}, ["training", "['train']"]),
    ({"validation_split": "test"}, ["test", "['train']"]),
    ({"image_column_name": "img"}, ["--image_column_name img", "'image'"]),
    ({"model_name_or_path": "./missing"}, ["missing"]),
]


@pytest.mark.parametrize("changes, expected", BAD_FLAGS, ids=[name for changes, _ in BAD_FLAGS for name in changes])
def test_bad_flags_fail_before_training(tmp_path, monkeypatch, changes, expected):
    assert_fails_before_training(tmp_path, monkeypatch, expected, **changes)
    assert list(tmp_path.iterdir()) == []


def assert_fails_before_training(tmp_path: Path, monkeypatch, expected: list[str], **changes: Any) -> None:
    """The command ends with exit code 1 and a message that has the expected words, and no batch was trained on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Trainer, "train", lambda *_: pytest.fail("training started"))
    flags = {**FLAGS, "output_dir": "out", **changes}
    monkeypatch.setattr("sys.argv", ["train.py", *command_line(**flags)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code.startswith("error: ")  # Python prints a text and exits with 1
    for word in expected:
        assert word in end.value.code


@pytest.mark.parametrize("output_dir", ["file", "file/run", "."])
def test_bad_output_dir_fails_before_training(tmp_path, monkeypatch, output_dir):
    (tmp_path / "file").write_text("precious")
    assert_fails_before_training(tmp_path, monkeypatch, ["--output_dir", output_dir], output_dir=output_dir)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("changed", [{"hidden_size": 16}, {"image_size": 16}], ids=str)
def test_checkpoint_of_another_geometry_fails_before_training(trained, tmp_path, monkeypatch, changed):
    # Otherwise its weights would be replaced by random ones.
    expected = ["--model_name_or_path", *changed]
    assert_fails_before_training(tmp_path, monkeypatch, expected, model_name_or_path=trained, **changed)


def test_checkpoint_of_another_model_fails_before_training(tmp_path, monkeypatch):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    expected = ["--model_name_or_path", "vit"]
    assert_fails_before_training(tmp_path, monkeypatch, expected, model_name_or_path="./vit", **NO_GEOMETRY)


@pytest.mark.slow
def test_error_of_the_command_is_one_line_without_traceback(tmp_path):
    script = REPOSITORY / "training" / "train.py"
    process = run_python(script, *command_line(**FLAGS), "--fusion_token", "3", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip() == "error: --fusion_token: no such name; did you mean '--fusion_tokens'?"
    assert process.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(old_run):
    with pytest.raises(ValueError, match="the loss is (nan|inf).*--learning_rate"):
        train_here(old_run, learning_rate=1e30, max_train_steps=6)
    assert (old_run / "model.safetensors").read_text() == "old weights"
