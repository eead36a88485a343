"""Model cards that say what was measured."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.cli import parse_arguments
from fambav_training.release.model_card import create_card
from fambav_training.release.saving import save_release
from modeling_fambav import FambaVConfig, FambaVForImageClassification
from support.helpers import tiny_config
from support.releases import ARGUMENTS, make_results
from train import TrainingArguments


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    config = tiny_config()
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    (tmp_path / "release").mkdir()
    save_release(tmp_path / "release", FambaVForImageClassification(config), processor, make_results(config))
    return tmp_path / "release"


def read_card(release: Path) -> str:
    return (release / "README.md").read_text()


def test_front_matter_is_what_the_hub_reads(release):
    card = ModelCard.load(release / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.model_name == "fambav-digits-upper"
    measured = {result.metric_name: (result.metric_type, result.metric_value) for result in data.eval_results}
    assert measured == {"accuracy": ("accuracy", 81.23), "top-5 accuracy": ("accuracy", 98.77)}
    for result in data.eval_results:
        assert (result.task_type, result.dataset_name) == ("image-classification", "digits")

    front_matter = yaml.safe_load(card.content.split("---")[1])
    assert front_matter["model-index"][0]["name"] == "fambav-digits-upper"
    assert [metric["value"] for metric in front_matter["model-index"][0]["results"][0]["metrics"]] == [81.23, 98.77]


def test_card_says_what_was_measured_and_how(release):
    text = " ".join(read_card(release).split())  # wherever lines are broken
    expected = [
        "81.23",
        "98.77",
        "82.35",
        "97.65",
        "215,818 parameters",
        "3 layers of width 32",
        "16 patches",
        "4 x 4 pixels",
        "17, 15, 13",
        "`upper`, 4 of 16 patch tokens",
        "cosine similarity",
        "mean reduction",
        "raster order",
        "360 validation images",
        "1,437 images",
        "440 steps",
        "20 epochs",
        "seed 17",
        "57.6 s",
        "488 images/s",
        "839 MiB",
        "cpu: Some Processor, 2 cores",
        "3 process(es)",
        "bf16",
        "scan backend numba",
        "0123456789abcdef-dirty",
        "python 3.11.7",
        "torch 2.13.0",
        "transformers 5.23.0",
    ]
    assert [phrase for phrase in expected if phrase not in text] == []


def test_card_has_no_hole(release):
    assert not re.search(r"\{\{|\}\}|None|nan|Undefined", read_card(release))


def test_command_of_the_card_repeats_the_run(release):
    command = re.search(r"```bash\n(accelerate launch .*?)\n```", read_card(release), re.DOTALL)[1]
    launch, flags = command.replace("\\\n", " ").split("training/train.py")
    assert launch == "accelerate launch --multi_gpu --num_processes 3 "
    args, overrides = parse_arguments(TrainingArguments, "", shlex.split(flags))
    expected = {name: value for name, value in ARGUMENTS.items() if value is not None}
    given = {**vars(args), **overrides, "output_dir": str(args.output_dir)}
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"fusion_strategy": "all"},
        {"fusion_tokens": 1},
        {"fusion_metric": "dot"},
        {"fusion_window": 3},
        {"fusion_reduction": "size_weighted"},
        {"fusion_order": "appended"},
        {"fusion_scale_time_step": True},
    ],
    ids=str,
)
def test_card_tells_every_fusion_setting_apart(changed):
    def fusion_section(config: FambaVConfig) -> str:
        text = create_card(config, make_results(config)).text
        return re.search(r"## Token fusion\n(.*?)\n## ", text, re.DOTALL)[1]

    assert fusion_section(tiny_config(**changed)) != fusion_section(tiny_config())


def test_card_of_a_model_without_fusion():
    config = tiny_config(fusion_strategy="none")
    text = create_card(config, make_results(config)).text
    assert re.search(r"## Token fusion\n\noff\.", text)
    assert "17, 17, 17" in text


@pytest.mark.parametrize("split", ["validation", "test"])
def test_card_names_the_split_that_was_scored(split):
    config = tiny_config()
    results = make_results(config, arguments={**ARGUMENTS, "validation_split": split})
    assert {result.dataset_split for result in create_card(config, results).data.eval_results} == {split}


def test_card_names_a_dataset_of_the_hub_and_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a clone may have a folder of that name
    config = tiny_config()
    card = create_card(config, make_results(config, dataset="uoft-cs/cifar100"))
    assert card.data.datasets == ["uoft-cs/cifar100"]
    assert {result.dataset_type for result in card.data.eval_results} == {"uoft-cs/cifar100"}

    (tmp_path / "pets").mkdir()
    card = create_card(config, make_results(config, dataset=str(tmp_path / "pets")))
    assert card.data.datasets is None
    assert {result.dataset_type for result in card.data.eval_results} == {"pets"}


def test_no_token_appears_in_a_release(release):
    for path in release.iterdir():
        assert b"hf_verysecrettoken" not in path.read_bytes(), path.name
