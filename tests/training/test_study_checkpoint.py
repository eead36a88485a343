"""What is added to a card: confused pairs counted by hand, accuracy over fusion as scored one by one, and errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import study_checkpoint
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.scoring import Scorer, load_classifier
from fambav_training.evaluation.study import most_confused, robustness_settings
from support.helpers import tiny_config
from support.training_runs import FLAGS, own_process_state, train_here

WORDS = ["--dataset_name", "digits", "--max_eval_samples", "120"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "model"
    train_here(folder, **FLAGS)
    return folder


def test_pairs_count_both_directions():
    names = {0: "cat", 1: "dog", 2: "emu"}
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0])
    predicted = torch.tensor([1, 1, 0, 1, 0, 1, 0])
    assert most_confused(predicted, labels, names, 2) == [
        {"classes": ["cat", "dog"], "images": 3},
        {"classes": ["cat", "emu"], "images": 1},
    ]
    assert most_confused(labels, labels, names, 2) == []


def test_fusion_goes_from_none_to_twice_its_own():
    settings = robustness_settings(tiny_config(fusion_strategy="all", fusion_tokens=3))
    assert [fusion.get("fusion_tokens", 0) for fusion in settings] == [0, 2, 3, 4, 6]
    assert {fusion["fusion_strategy"] for fusion in settings[1:]} == {"all"}
    # At most half of the 16 patches
    assert robustness_settings(tiny_config(fusion_tokens=7))[-1]["fusion_tokens"] == 8
    assert robustness_settings(tiny_config(fusion_strategy="none")) == []


def test_card_and_results_have_what_was_measured(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    before = json.loads((folder / "all_results.json").read_text())
    with own_process_state():
        study_checkpoint.study_checkpoint(study_checkpoint.parse([str(folder), *WORDS]))
    results = json.loads((folder / "all_results.json").read_text())
    study = results.pop("study")
    assert results == before and study["images"] == 120
    card = (folder / "README.md").read_text()
    for pair in study["confused_pairs"]:
        assert f"| {' and '.join(pair['classes'])} | {pair['images']} |" in card
    rows = {row["fusion_tokens"]: row for row in study["fusion"]}
    assert list(rows) == [0, 2, 3, 4, 6]
    assert f"| 3 (as trained) | {rows[3]['tokens_left']} | {rows[3]['top1']:.2f} |" in card
    with own_process_state():
        for fusion in ({"fusion_strategy": "none"}, {"fusion_tokens": 6}):
            loaded, processor = load_classifier(str(folder), fusion)
            scorer = Scorer(loaded, processor, load_labeled_images("digits"), Accelerator(cpu=True), 60, 120)
            row = rows[fusion.get("fusion_tokens", 0)]
            assert row["top1"] == scorer.score()["top1"]
            assert row["tokens_left"] == loaded.config.sequence_lengths[-1]
    errors = sum(pair["images"] for pair in study["confused_pairs"])
    assert 0 < errors <= round(120 * (1 - rows[3]["top1"] / 100))
    assert "no class of error was studied" not in card
    assert "no class of error was studied" in (model / "README.md").read_text()


def test_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL .*: expected all_results.json in it"):
        study_checkpoint.study_checkpoint(study_checkpoint.parse([str(tmp_path), *WORDS]))
