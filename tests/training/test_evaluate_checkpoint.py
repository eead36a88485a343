"""Scoring a checkpoint: what training reported, other fusion at evaluation, classes by name, and clear errors."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import evaluate_checkpoint
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation import scoring
from fambav_training.fusion.settings import UNFUSED, fused
from fambav_training.fusion.speed import Speedup
from modeling_fambav import FambaVForImageClassification
from support.helpers import tiny_config

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random classifier of the ten digits at 16 px, fused by a schedule."""
    torch.manual_seed(0)
    names = {index: str(index) for index in range(10)}
    config = tiny_config(
        id2label=names,
        label2id={name: index for index, name in names.items()},
        fusion_strategy="custom",
        fusion_schedule=[0, 3, 3],
    )
    folder = tmp_path_factory.mktemp("model")
    FambaVForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def run(monkeypatch, tmp_path, *words) -> dict:
    """Results of the command line."""
    output = tmp_path / "results" / "evaluation.json"
    monkeypatch.setattr(
        sys, "argv", ["evaluate_checkpoint.py", *map(str, words), "--cpu", "--output_file", str(output)]
    )
    evaluate_checkpoint.main()
    return json.loads(output.read_text())


def test_scores_are_those_of_a_plain_loop(model_folder, monkeypatch, tmp_path, capsys):
    results = run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 50, "--per_device_eval_batch_size", 16)
    dataset = load_labeled_images("digits").validation.shuffle(seed=0).select(range(50))
    model = FambaVForImageClassification.from_pretrained(model_folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(model_folder)
    inputs = processor([image.convert("RGB") for image in dataset["image"]], return_tensors="pt")
    with torch.no_grad():
        ranked = model(**inputs).logits.argsort(descending=True).numpy()
    truth = np.array(dataset["label"][:])[:, None]
    assert results["top1"] == pytest.approx(100 * (ranked[:, :1] == truth).any(1).mean())
    assert results["top5"] == pytest.approx(100 * (ranked[:, :5] == truth).any(1).mean())
    assert results["validation_images"] == 50 and results["sequence_lengths"] == [17, 14, 11]
    assert f"top-1 {results['top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, lengths",
    [
        (["--fusion_strategy", "none"], [17, 17, 17]),
        (["--fusion_strategy", "all", "--fusion_tokens", 2], [15, 13, 11]),
        (["--fusion_schedule", 1, 0, 1], [16, 16, 15]),
    ],
    ids=str,
)
def test_fusion_can_be_another_one(model_folder, monkeypatch, tmp_path, flags, lengths):
    results = run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, *flags)
    assert results["sequence_lengths"] == lengths


def by_tokens(model, pixel_values, fusion, max_seconds=0.0) -> Speedup:
    """Stands for `measured_speedup`: a millisecond per token."""
    seconds = []
    for condition in (UNFUSED, fusion):
        with fused(model.config, condition):
            seconds.append(sum(model.config.sequence_lengths) / 1000)
    times = seconds[0] / seconds[1]
    return Speedup(times, low=times - 0.25, high=times + 0.25, rounds=100, seconds=seconds[1])


def test_sweep_gives_the_scores_of_single_runs(model_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scoring, "measured_speedup", by_tokens)
    common = [model_folder, "--max_eval_samples", 40, "--per_device_eval_batch_size", 16]
    report = run(monkeypatch, tmp_path, *common, "--sweep", "upper", "all", "--sweep_tokens", 4, 1)
    printed = capsys.readouterr().out
    rows = report["rows"]
    assert [(row["strategy"], row["tokens"]) for row in rows] == [
        ("none", None),
        ("upper", 1),
        ("upper", 4),
        ("all", 1),
        ("all", 4),
    ]
    assert len({row["top1"] for row in rows}) > 1
    for row in rows:
        flags = ["--fusion_strategy", row["strategy"], *(["--fusion_tokens", row["tokens"]] if row["tokens"] else [])]
        single = run(monkeypatch, tmp_path, *common, *flags)
        assert {name: row[name] for name in ("top1", "top5", "sequence_lengths")} == {
            name: single[name] for name in ("top1", "top5", "sequence_lengths")
        }
        assert row["images_per_second"] == pytest.approx(16 / (sum(row["sequence_lengths"]) / 1000))
        assert row["speedup"] == pytest.approx(51 / sum(row["sequence_lengths"]))
    assert (tmp_path / "results" / "evaluation.md").read_text() in printed
    assert (tmp_path / "results" / "evaluation.png").exists()


def test_sweep_by_what_is_saved_in_both_orders(model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "measured_speedup", by_tokens)
    words = ["--sweep", "upper", "--sweep_saved", 0.2, "--sweep_orders", "raster", "appended"]
    unfused, *rows = run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, *words)["rows"]
    assert (unfused["strategy"], unfused["changes"]) == ("none", {})
    assert [(row["strategy"], row["changes"]) for row in rows] == [
        ("upper", {"fusion_order": "raster"}),
        ("upper", {"fusion_order": "appended"}),
    ]
    for row in rows:
        assert 1 - row["multiply_adds"] / unfused["multiply_adds"] == pytest.approx(0.2, abs=0.02)
    assert (tmp_path / "results" / "evaluation.png").exists()


def test_ablation_gives_the_scores_of_single_runs(model_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scoring, "measured_speedup", by_tokens)
    common = [model_folder, "--max_eval_samples", 40, "--fusion_strategy", "upper", "--fusion_tokens", 5]
    rows = run(monkeypatch, tmp_path, *common, "--ablate")["rows"]
    assert (tmp_path / "results" / "evaluation.md").read_text() in capsys.readouterr().out
    assert len({row["top1"] for row in rows}) > 1
    for row in rows[1:]:
        flags = [word for name, value in row["changes"].items() for word in (f"--{name}", value)]
        single = run(monkeypatch, tmp_path, *common, *flags)
        assert {name: row[name] for name in ("top1", "top5")} == {name: single[name] for name in ("top1", "top5")}


def test_sweep_that_is_stopped_leaves_what_it_measured(model_folder, monkeypatch, tmp_path, capsys):
    calls = []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_tokens(*arguments)

    monkeypatch.setattr(scoring, "measured_speedup", stopped)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, "--sweep", "all", "--sweep_tokens", 1, 2, 3)
    assert end.value.code == 130 and "stopped after 2 of 4 rows" in capsys.readouterr().err
    report = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert [row["tokens"] for row in report["rows"]] == [None, 1]


@pytest.mark.parametrize(
    "flags, strategy",
    [
        (["--target_tokens", 0.7], "upper"),  # the model has a schedule, which is no strategy
        (["--target_tokens", 0.7, "--fusion_strategy", "all"], "all"),
        (["--target_speedup", 1.5, "--fusion_strategy", "lower"], "lower"),
    ],
    ids=str,
)
def test_targets_are_found_and_scored(model_folder, monkeypatch, tmp_path, capsys, flags, strategy):
    monkeypatch.setattr(evaluate_checkpoint, "measured_speedup", by_tokens)
    results = run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, *flags)
    printed = capsys.readouterr().out
    found = results["found"]
    assert found["token_share"] == pytest.approx(sum(results["sequence_lengths"]) / (3 * 17))
    assert found["speedup"] == pytest.approx(1 / found["token_share"])
    assert found["speedup_quartiles"] == pytest.approx([found["speedup"] - 0.25, found["speedup"] + 0.25])
    assert (found["speedup_rounds"], found["speedup_is_noisy"]) == (100, True)
    assert f"{found['speedup']:.2f} +- 0.09 times as fast as without fusion (half of 100 rounds between" in printed
    assert "measure again when it is idle" in printed
    if "--target_tokens" in flags:
        assert found["token_share"] == pytest.approx(0.7, abs=0.02)
    else:
        assert found["speedup"] >= 1.5 and found["fusion"]["fusion_strategy"] == strategy
    fused_layers = [
        before > after for before, after in zip([17, *results["sequence_lengths"]], results["sequence_lengths"])
    ]
    assert fused_layers == {"upper": [False, True, True], "all": [True] * 3, "lower": [True, True, False]}[strategy]
    # What is printed can be pasted behind the command
    words = printed.split("found ")[1].split(":")[0].split()
    again = run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, *words)
    assert again["sequence_lengths"] == results["sequence_lengths"] and again["top1"] == results["top1"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--sweep", "--sweep_tokens", "2", "0"], "fusion_tokens=0"),
        (["--sweep", "upper", "--sweep_saved", "0.9"], "--sweep_saved 0.9: share of the multiply-adds 0.1: 'upper'"),
        (["--ablate", "--fusion_strategy", "none"], "--ablate: expected a fusion to vary"),
        (["--target_tokens", "0.1"], "'upper' fusion of this model leaves at least"),
        (["--target_speedup", "0.5"], "speedup 0.5: expected a number above 1"),
    ],
    ids=str,
)
def test_impossible_fusion_is_an_error_of_one_line(model_folder, monkeypatch, tmp_path, words, expected):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, model_folder, "--max_eval_samples", 8, *words)
    assert end.value.code.startswith("error: ") and expected in end.value.code


def write_colors(folder, names) -> None:
    """Three images of each colour, classes in this order."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    images = [Image.new("RGB", (16, 16), COLORS.get(name, (9, 9, 9))) for name in names for _ in range(3)]
    rows = {"image": images, "label": [index for index in range(len(names)) for _ in range(3)]}
    dataset = DatasetDict(test=Dataset.from_dict(rows, features=features))
    folder.mkdir()
    dataset["test"].to_parquet(folder / "test.parquet")


@pytest.fixture
def color_model(tmp_path):
    """A model whose classes are red, green and blue, in this order."""
    torch.manual_seed(0)
    names = dict(enumerate(COLORS))
    config = tiny_config(id2label=names, label2id={name: index for index, name in names.items()})
    FambaVForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_classes_are_matched_by_name(color_model, monkeypatch, tmp_path):
    scores = []
    for number, order in enumerate((["red", "green", "blue"], ["blue", "red", "green"])):
        write_colors(tmp_path / f"data{number}", order)
        words = ["--dataset_name", tmp_path / f"data{number}", "--train_split", "test", "--validation_split", "test"]
        scores.append(run(monkeypatch, tmp_path, color_model, *words)["top1"])
    assert scores[0] == scores[1] > 0  # a constant prediction has one class right


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--fusion_tokens", "0"], "fusion_tokens=0"),
        (["--dataset_name", "./missing"], "--dataset_name ./missing"),
        (["--validation_split", "test"], "--validation_split 'test'"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0: expected a number >= 1"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0: expected a number >= 1"),
        (["--sweep_tokens", "1"], "--sweep_tokens: expected --sweep with it"),
        (["--sweep_saved", "0.1"], "--sweep_saved: expected --sweep with it"),
        (["--sweep", "--sweep_saved", "0.1", "--sweep_tokens", "1"], "--sweep_tokens: --sweep_saved chooses them"),
        (["--sweep", "--sweep_saved", "0.1", "1.5"], "--sweep_saved 1.5: expected numbers above 0 and below 1"),
        (["--sweep", "--sweep_orders", "raster", "--fusion_order", "raster"], "--fusion_order: --sweep chooses it"),
        (["--sweep", "--fusion_strategy", "all"], "--fusion_strategy: --sweep chooses it"),
        (["--target_tokens", "0.5", "--fusion_tokens", "2"], "--fusion_tokens: --target_tokens chooses it"),
    ],
    ids=str,
)
def test_errors_are_one_line(color_model, monkeypatch, tmp_path, words, expected):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, color_model, *words)
    assert end.value.code.startswith("error: ") and expected in end.value.code


def test_a_class_that_the_model_does_not_know_is_refused(color_model, monkeypatch, tmp_path):
    write_colors(tmp_path / "data", ["red", "purple", "green"])
    words = ["--dataset_name", tmp_path / "data", "--train_split", "test", "--validation_split", "test"]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, color_model, *words)
    assert "'purple'" in end.value.code and "'red'" in end.value.code


def test_another_model_is_refused(monkeypatch, tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, tmp_path / "vit")
    assert "'vit'" in end.value.code
