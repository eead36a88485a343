"""Training on a GPU's images: that it learns, stops and goes on with the same bits."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fambav_training.gpu import time_to_accuracy
from fambav_training.gpu.images_file import Images
from fambav_training.gpu.plan import Plan, full_plan, rehearsal
from fambav_training.gpu.steps import Cell
from modeling_fambav import FambaVConfig, FambaVForImageClassification

PLAN = dataclasses.replace(rehearsal(), epochs=3, learning_rate=5e-3)
CONDITIONS = {"device": "cpu", "versions": {"torch": "2.9"}, "images_sha256": "0123"}


def cells(images: Images, folder: Path, plan: Plan = PLAN, measured: dict | None = None, **conditions) -> list[Cell]:
    return list(time_to_accuracy.cells(plan, images, folder, {**CONDITIONS, **conditions}, measured or {}))


@pytest.fixture(scope="module")
def images() -> Images:
    """Two classes, dark and bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 2
    noise = torch.randint(80, (160, 3, 16, 16), generator=generator)
    pixels = (noise + 150 * labels[:, None, None, None]).to(torch.uint8)
    return Images(pixels[:128], labels[:128], pixels[128:], labels[128:], "two classes", "0123")


def test_it_learns_and_a_stop_changes_no_bit(images, tmp_path):
    whole = {cell.name: cell.measure() for cell in cells(images, tmp_path / "whole")}
    assert list(whole) == [f"{strategy}, epoch {epoch}" for epoch in (1, 2, 3) for strategy in ("upper", "none")]
    for strategy in time_to_accuracy.STRATEGIES:
        epochs = [whole[f"{strategy}, epoch {epoch}"] for epoch in (1, 2, 3)]
        assert epochs[-1]["top1"] == 100
        assert epochs[0]["train_seconds"] < epochs[1]["train_seconds"] < epochs[2]["train_seconds"]
    for cell in cells(images, tmp_path / "stopped")[:3]:
        cell.measure()
    again = {cell.name: cell.measure() for cell in cells(images, tmp_path / "stopped")}
    for name, record in again.items():
        assert record["train_loss"] == whole[name]["train_loss"] and record["top1"] == whole[name]["top1"]
    for strategy in time_to_accuracy.STRATEGIES:
        one, other = (
            torch.load(tmp_path / folder / f"{strategy}.pt", weights_only=True)["model"]
            for folder in ("whole", "stopped")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(records: dict) -> dict:
    names = ("train_loss", "top1")
    return {cell: {name: record[name] for name in names} for cell, record in records.items()}


@pytest.fixture
def first_epoch(images, tmp_path) -> dict:
    """Of both strategies, with their checkpoints in `tmp_path`."""
    return {cell.name: cell.measure() for cell in cells(images, tmp_path)[:2]}


def test_a_checkpoint_of_something_else_is_refused(images, tmp_path, first_epoch):
    cells(images, tmp_path)
    with pytest.raises(ValueError, match="upper.pt: trained with images_sha256 '0123', now it is '4567'"):
        cells(images, tmp_path, images_sha256="4567")
    with pytest.raises(ValueError, match="upper.pt: trained with epochs 3, now it is 4; give another --output_dir"):
        cells(images, tmp_path, dataclasses.replace(PLAN, epochs=4))
    with pytest.raises(ValueError, match="upper.pt: trained with hidden_size 32, now it is 64"):
        cells(images, tmp_path, dataclasses.replace(PLAN, model={**PLAN.model, "hidden_size": 64}))
    (tmp_path / "upper.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="upper.pt: cannot be read"):
        cells(images, tmp_path)
    torch.save({"model": {}}, tmp_path / "upper.pt")
    with pytest.raises(ValueError, match="upper.pt: not a checkpoint of this script"):
        cells(images, tmp_path)


def test_epochs_of_two_trainings_do_not_become_one_curve(images, tmp_path, first_epoch):
    cells(images, tmp_path, measured=first_epoch)
    cells(images, tmp_path, measured={**first_epoch, "upper, epoch 2": {"error": "out of memory"}})
    (tmp_path / "none.pt").unlink()
    with pytest.raises(ValueError, match="none.pt: expected the checkpoint of the epochs that are measured already"):
        cells(images, tmp_path, measured=first_epoch)
    complete = {f"none, epoch {epoch}": first_epoch["none, epoch 1"] for epoch in (1, 2, 3)}
    cells(images, tmp_path, measured=complete)  # nothing is left to be trained


def test_an_epoch_that_fails_midway_is_trained_again_from_its_start(images, tmp_path, monkeypatch):
    whole = {cell.name: cell.measure() for cell in cells(images, tmp_path / "whole")}
    calls, forward = [], FambaVForImageClassification.forward

    def fail_once(model, *arguments, **options):
        calls.append(model.training)
        if sum(calls) == 1 + 4 + 1 + 4 + 3:  # warm-up and first epoch of both runs, third batch
            raise RuntimeError("out of memory")
        return forward(model, *arguments, **options)

    monkeypatch.setattr(FambaVForImageClassification, "forward", fail_once)
    records, failed = {}, []
    for cell in cells(images, tmp_path / "failed"):
        try:
            records[cell.name] = cell.measure()
        except RuntimeError:
            failed.append(cell)
    assert [cell.name for cell in failed] == ["upper, epoch 2"]
    records["upper, epoch 2"] = failed[0].measure()
    assert without_seconds(records) == without_seconds(whole)


def test_the_clock_does_not_see_the_first_pass(images, tmp_path, monkeypatch):
    clock, forward = [0.0], FambaVForImageClassification.forward
    first = []

    def slow_at_first(model, *arguments, **options):
        if model.training:
            clock[0] += 1 if model in first else 1000  # as if it was compiled
            first.append(model)
        return forward(model, *arguments, **options)

    monkeypatch.setattr(FambaVForImageClassification, "forward", slow_at_first)
    monkeypatch.setattr(time_to_accuracy, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for epochs in (1, 3):  # the second time from a checkpoint
        records = [cell.measure() for cell in cells(images, tmp_path)[: 2 * epochs]]
    assert [record["train_seconds"] for record in records] == [4, 4, 8, 8, 12, 12]


def test_the_first_pass_changes_nothing(images, tmp_path):
    run = time_to_accuracy._Run(PLAN, images, "upper", tmp_path / "upper.pt", CONDITIONS)
    run._prepare()
    names = ("model", "optimizer", "schedule")
    before = copy.deepcopy([getattr(run, name).state_dict() for name in names])
    random = torch.get_rng_state()
    run._warm_up()
    assert torch.equal(torch.get_rng_state(), random)
    assert not run.optimizer.state and all(parameter.grad is None for parameter in run.model.parameters())
    weights, *others = (getattr(run, name).state_dict() for name in names)
    assert others == before[1:] and all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())


def test_upper_fusion_removes_the_share_of_the_paper():
    model = {"image_size": 32, **full_plan().model}
    upper = FambaVConfig(**model, **time_to_accuracy._fusion("upper", model))
    assert (upper.sequence_lengths[0], upper.sequence_lengths[-1]) == (65, 9)
    assert sum(upper.tokens_removed) == round(171 * 65 / 197)
    assert not sum(FambaVConfig(**model, **time_to_accuracy._fusion("none", model)).tokens_removed)


def test_an_epoch_draws_every_image_once_and_all_places(images, tmp_path):
    run = time_to_accuracy._Run(PLAN, images, "none", tmp_path / "none.pt", CONDITIONS)
    run._prepare()
    rows, down, right, is_mirrored = run._random_numbers(0)
    assert rows.shape == (4, 32) and sorted(rows.flatten().tolist()) == list(range(128))
    assert set(down.flatten().tolist()) == set(right.flatten().tolist()) == set(range(9))
    assert set(is_mirrored.flatten().tolist()) == {0, 1}
    assert not torch.equal(down, right) and not torch.equal(run._random_numbers(1)[0], rows)


def test_images_are_moved_and_mirrored_but_not_changed():
    columns = torch.arange(1, 9, dtype=torch.uint8).expand(64, 3, 8, 8).contiguous()
    generator = torch.Generator().manual_seed(0)
    places = (torch.randint(high, (64,), generator=generator) for high in (9, 9, 2))
    augmented = time_to_accuracy._augmented(columns, *places)
    assert augmented.shape == columns.shape and augmented.dtype == torch.uint8
    directions = set()
    rows = [max(image, key=lambda row: sum(value != 127 for value in row)) for image in augmented[:, 0].tolist()]
    for row in rows:
        inside = [value for value in row if value != 127]
        assert inside in (sorted(inside), sorted(inside, reverse=True)) and len(inside) >= 4
        directions.add(inside == sorted(inside))
    assert directions == {True, False}
    assert len({tuple(row) for row in rows}) > 8
