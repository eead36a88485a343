"""Stored views of a teacher: what is stored, stopping and resuming, training on it, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import store_teacher_views
from fambav_training.data import crops as crops_module
from fambav_training.data.augmentation import mixed_cross_entropy
from fambav_training.data.crops import Crops, draw_crops, mean_color, take_crops
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.run import setup, trainer
from fambav_training.run.checkpointing import CheckpointError
from fambav_training.run.distillation import distillation_loss, load_teacher
from fambav_training.teacher.views import MANIFEST, TeacherViews, TeacherViewsError
from support.training_runs import FLAGS, read_results, train_here

VIEWS = ["--dataset_name", "digits", "--image_size", "8", "--views", "3", "--random_crop_padding", "2"]
VIEWS += ["--images_per_file", "500"]
RUN = {**FLAGS, "distillation_weight": 0.8, "distillation_loss": "standardized", "max_train_steps": 6}
NAMES = [str(index) for index in range(10)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    train_here(folder, **FLAGS)
    return folder


@pytest.fixture(scope="module")
def stored(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("views") / "views"
    store_teacher_views.store(store_teacher_views.parse([str(teacher), str(folder), *VIEWS]))
    return folder


# ---- views ----


def test_crops_are_windows_of_the_padded_image():
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    crops = Crops(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([False, True]))
    fill = torch.tensor([7, 8, 9], dtype=torch.uint8)
    views = take_crops(pixels, crops, 2, fill)
    for index in range(2):
        for channel in range(3):
            padded = np.pad(pixels[index, channel].numpy(), 2, constant_values=fill[channel].item())
            top, left = crops.top[index], crops.left[index]
            expected = padded[top : top + 4, left : left + 5]
            expected = expected[:, ::-1] if crops.flip[index] else expected
            np.testing.assert_array_equal(views[index, channel].numpy(), expected)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 1, 6, 10)], ids=str)
def test_crops_gathered_at_once_are_those_copied_one_by_one(shape, monkeypatch):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    crops = draw_crops(shape[0], padding=2, flip_prob=0.5, generator=torch.Generator().manual_seed(1))
    fill = torch.arange(shape[1], dtype=torch.uint8)
    copied = take_crops(pixels, crops, 2, fill)
    monkeypatch.setattr(crops_module, "_copy_crops", crops_module._gather_crops)
    assert crops.flip.any() and torch.equal(take_crops(pixels, crops, 2, fill), copied)


def test_random_crops_reach_every_place():
    crops = draw_crops(2000, padding=1, flip_prob=0.25, generator=torch.Generator().manual_seed(0))
    assert set(crops.top.tolist()) == set(crops.left.tolist()) == {0, 1, 2}
    assert crops.flip.float().mean().item() == pytest.approx(0.25, abs=0.04)


# ---- what is stored ----


def test_stored_logits_are_the_teachers_of_the_stored_views(teacher, stored):
    images = load_labeled_images("digits", validation_split="train")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_convert_rgb=True)
    pixels = CachedImages(images.train, images.image_column, images.label_column, processor).pixels
    model = load_teacher("--flag", str(teacher), processor, NAMES, torch.device("cpu"))
    rows = load_dataset(str(stored), split="train").with_format("numpy")
    assert len(rows) == len(pixels) == 1797
    for index in (0, 499, 500, 1796):
        row = rows[index]
        assert row["logits"].shape == (3, 10) and row["top"].max() <= 4
        crops = Crops(*(torch.from_numpy(row[name].copy()) for name in ("top", "left", "flip")))
        fill = mean_color(processor)
        views = take_crops(pixels[index].expand(3, -1, -1, -1), crops, 2, fill)
        expected = model(normalize(views, processor))
        torch.testing.assert_close(torch.from_numpy(row["logits"]).float(), expected, rtol=2e-3, atol=2e-3)


def test_views_in_bfloat16_are_nearly_those_in_float32(teacher, tmp_path):
    words = [*VIEWS, "--max_train_samples", "60", "--mixed_precision", "bf16"]
    args = store_teacher_views.parse([str(teacher), str(tmp_path / "half"), *words])
    assert store_teacher_views.store(args).mixed_precision == "bf16"
    words[-1] = "no"
    store_teacher_views.store(store_teacher_views.parse([str(teacher), str(tmp_path / "full"), *words]))
    half, full = (
        torch.from_numpy(load_dataset(str(tmp_path / name), split="train").with_format("numpy")["logits"][:]).float()
        for name in ("half", "full")
    )
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0, atol=0.05 * full.std().item())
    args = store_teacher_views.parse([str(teacher), str(tmp_path / "half"), *words])
    with pytest.raises(TeacherViewsError, match="holds views with mixed_precision bf16, not no"):
        store_teacher_views.store(args)


def test_stopped_command_goes_on_and_ends_as_the_whole_one(teacher, stored, tmp_path, monkeypatch):
    folder, write, calls = tmp_path / "views", store_teacher_views.write_file, []

    def stop_in_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    args = store_teacher_views.parse([str(teacher), str(folder), *VIEWS])
    monkeypatch.setattr(store_teacher_views, "write_file", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        store_teacher_views.store(args)
    with pytest.raises(TeacherViewsError, match="is missing; run the command"):
        TeacherViews(folder, NAMES)
    store_teacher_views.store(args)
    assert len(calls) == 5  # two files, the one that was stopped, and the two that were left
    assert TeacherViews(folder, NAMES).fingerprint() == TeacherViews(stored, NAMES).fingerprint()


def test_other_settings_need_another_folder(teacher, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "views")
    args = store_teacher_views.parse([str(teacher), str(tmp_path / "views"), *VIEWS, "--seed", "1"])
    with pytest.raises(TeacherViewsError, match="holds views with seed 0, not 1"):
        store_teacher_views.store(args)


def test_folder_older_than_a_setting_holds_what_its_default_says(teacher, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "views")
    manifest = json.loads((stored / MANIFEST).read_text())
    del manifest["mixed_precision"]
    (tmp_path / "views" / MANIFEST).write_text(json.dumps(manifest))
    args = store_teacher_views.parse([str(teacher), str(tmp_path / "views"), *VIEWS])
    assert store_teacher_views.store(args).mixed_precision == "no"
    assert TeacherViews(tmp_path / "views", NAMES).fingerprint() == TeacherViews(stored, NAMES).fingerprint()


def test_folder_with_something_else_is_refused(teacher, tmp_path):
    (tmp_path / "thesis.tex").touch()
    args = store_teacher_views.parse([str(teacher), str(tmp_path), *VIEWS])
    with pytest.raises(TeacherViewsError, match="new, empty or of stored views"):
        store_teacher_views.store(args)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--views", "0"], "--views 0: expected at least 1"),
        (["--horizontal_flip_prob", "2"], "--horizontal_flip_prob 2.0: expected a number in"),
        (["--image_size", "1", "2", "3"], "one or two integers"),
        (["--random_crop_padding", "200"], "--random_crop_padding 200: expected 0 to 127"),
    ],
    ids=str,
)
def test_bad_flags_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        store_teacher_views.parse(["teacher", "out", "--dataset_name", "digits", *words])
    assert message in capsys.readouterr().err


# ---- reading ----


def test_views_are_found_by_the_pixels_in_any_order(stored):
    views = TeacherViews(stored, NAMES[::-1])
    images = load_labeled_images("digits", validation_split="train")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_convert_rgb=True)
    pixels = CachedImages(images.train, images.image_column, images.label_column, processor).pixels
    chosen = torch.tensor([1700, 3, 900])
    torch.manual_seed(0)
    drawn, logits = views.draw(pixels[chosen], views.rows(pixels[chosen]))
    stored_rows = load_dataset(str(stored), split="train").with_format("numpy")
    fill = mean_color(processor)
    for position, index in enumerate(chosen.tolist()):
        row = stored_rows[index]
        matches = []
        for view in range(3):
            crops = Crops(*(torch.from_numpy(row[name][view : view + 1].copy()) for name in ("top", "left", "flip")))
            same_pixels = torch.equal(take_crops(pixels[index][None], crops, 2, fill)[0], drawn[position])
            own = torch.from_numpy(row["logits"][view].copy()).float().flip(0)  # the classes are the other way round
            matches.append(same_pixels and torch.equal(own, logits[position]))
        assert any(matches)


def test_every_view_is_drawn(stored):
    views = TeacherViews(stored, NAMES)
    rows = np.zeros(300, dtype=np.int64)
    _, logits = views.draw(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), rows)
    counts = torch.unique(logits, dim=0, return_counts=True)[1]
    assert len(counts) == 3 and counts.min() > 60


def test_images_without_stored_views_are_refused(stored):
    views = TeacherViews(stored, NAMES)
    with pytest.raises(TeacherViewsError, match="holds no views of 2 of 2 images"):
        views.rows(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    with pytest.raises(TeacherViewsError, match="made of images of 8 x 8 pixels, these have 16 x 8"):
        views.rows(torch.zeros(2, 3, 16, 8, dtype=torch.uint8))


def test_classes_that_the_teacher_does_not_know_are_refused(stored):
    with pytest.raises(TeacherViewsError, match="no logit of class 'wolf'"):
        TeacherViews(stored, [*NAMES[:9], "wolf"])


@pytest.mark.parametrize("damage", ["cut", "json", "format", "gone"])
def test_damaged_folder_is_refused(stored, tmp_path, damage):
    folder = tmp_path / "views"
    shutil.copytree(stored, folder)
    first = sorted((folder / "data").iterdir())[0]
    manifest = json.loads((folder / MANIFEST).read_text())
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    elif damage == "json":
        (folder / MANIFEST).write_text("{")
    elif damage == "format":
        (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 9}))
    else:
        (folder / MANIFEST).unlink()
    expected = {"cut": f"{first.name}: damaged", "json": "damaged", "format": "format 9", "gone": MANIFEST}
    with pytest.raises(TeacherViewsError, match=expected[damage]):
        TeacherViews(folder, NAMES)


# ---- training ----


def test_run_trains_on_stored_views_without_a_teacher(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    seen, draw = [], TeacherViews.draw

    def record(self, pixels, rows):
        seen.append(draw(self, pixels, rows))
        return seen[-1]

    monkeypatch.setattr(TeacherViews, "draw", record)
    train_here(tmp_path / "out", **RUN, teacher_views=stored)
    assert len(seen) == 6
    plain = {name: value for name, value in RUN.items() if not name.startswith("distillation")}
    train_here(tmp_path / "plain", **plain)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert read_results(tmp_path / "out")["arguments"]["teacher_views"] == str(stored)


@pytest.mark.parametrize("mix", [{}, {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}], ids=str)
def test_mixed_views_are_taught_by_both_of_their_logits(stored, tmp_path, monkeypatch, mix):
    drawn, losses, augmented, draw = [], [], [], TeacherViews.draw

    def record_views(self, pixels, rows):
        drawn.append(draw(self, pixels, rows))
        return drawn[-1]

    def record_loss(student_logits, teacher_logits, temperature, kind, targets):
        losses.append((teacher_logits, targets))
        return distillation_loss(student_logits, teacher_logits, temperature, kind, targets)

    def record_targets(logits, targets, label_smoothing):
        augmented.append(targets)
        return mixed_cross_entropy(logits, targets, label_smoothing)

    monkeypatch.setattr(TeacherViews, "draw", record_views)
    monkeypatch.setattr(trainer, "distillation_loss", record_loss)
    monkeypatch.setattr(trainer, "mixed_cross_entropy", record_targets)
    train_here(tmp_path / "out", **{**RUN, **mix}, teacher_views=stored)
    assert len(losses) == 6
    for (_, logits), (teacher_logits, targets), expected in zip(drawn, losses, augmented, strict=True):
        assert torch.equal(teacher_logits, logits)
        assert targets is (expected if mix else None)
    if mix:
        assert any((targets.weights < 0.9).any() for targets in augmented)


@pytest.mark.parametrize("mixup_alpha", [0, 0.8])
def test_resumed_run_ends_as_the_whole_one(stored, tmp_path, mixup_alpha):
    flags = {**RUN, "mixup_alpha": mixup_alpha}
    train_here(tmp_path / "whole", **flags, teacher_views=stored, checkpointing_steps=4)
    checkpoint = Path("checkpoints") / "step_000004"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "out" / checkpoint)
    shutil.copytree(stored, tmp_path / "moved")  # what counts is what it holds
    train_here(tmp_path / "out", **flags, teacher_views=tmp_path / "moved", resume_from_checkpoint="latest")
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_resuming_with_other_views_is_refused(teacher, stored, tmp_path):
    train_here(tmp_path / "out", **RUN, teacher_views=stored, checkpointing_steps=4)
    args = store_teacher_views.parse([str(teacher), str(tmp_path / "views"), *VIEWS, "--seed", "1"])
    store_teacher_views.store(args)
    with pytest.raises(CheckpointError, match="the views of .* have changed"):
        train_here(tmp_path / "out", **RUN, teacher_views=tmp_path / "views", resume_from_checkpoint="latest")


def test_card_says_what_the_teacher_had_seen(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "views")
    manifest = json.loads((stored / MANIFEST).read_text())
    (tmp_path / "views" / MANIFEST).write_text(json.dumps({**manifest, "teacher_pretrained_on": "ImageNet-1k"}))
    train_here(tmp_path / "out", **RUN, teacher_views=tmp_path / "views")
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"80% of the loss came from a teacher, `{manifest['teacher']}`, at temperature 2.0" in card
    assert "on standardized logits. It had seen 3 views of every training image. The teacher was pretrained on" in card
    assert "pretrained on ImageNet-1k" in card
    assert "trained on mixes" not in card
    train_here(tmp_path / "mixed", **RUN, teacher_views=tmp_path / "views", cutmix_alpha=0.5)
    card = " ".join((tmp_path / "mixed" / "README.md").read_text().split())
    assert "every training image; this model was trained on mixes of two of these views. The teacher" in card
