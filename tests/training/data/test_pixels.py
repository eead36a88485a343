"""Pixels: those of the pipeline, whether images are kept, decoded by workers or streamed, and corrupt images."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import train
from fambav_training.cli import parse_arguments
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.data.pixels import (
    CachedImages,
    CorruptImageError,
    DecodedImages,
    StreamedImages,
    normalize,
    to_pixels,
)
from fambav_training.data.stream_loader import StreamLoader
from fambav_training.run import loaders, setup, trainer
from modeling_fambav import FambaVConfig, FambaVForImageClassification
from support.helpers import noise
from support.training_runs import (
    FLAGS,
    command_line,
    read_metrics,
    read_results,
    run_in_two_processes,
    train_here,
    without_time,
)

PROCESSOR = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=[0.4, 0.5, 0.6], do_convert_rgb=True)


@pytest.fixture(scope="module")
def digits():
    return load_labeled_images("digits")


@pytest.fixture(scope="module")
def pipeline_pixels():
    """What `pipeline("image-classification")` feeds to the model, for an image or a file."""
    config = FambaVConfig(
        image_size=(12, 16), patch_size=4, hidden_size=16, num_hidden_layers=1, fusion_strategy="none"
    )
    classify = pipeline("image-classification", model=FambaVForImageClassification(config), image_processor=PROCESSOR)
    return lambda image: classify.preprocess(image)["pixel_values"]


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_training_sees_the_pixels_of_the_pipeline(mode, pipeline_pixels):
    image = noise(mode)
    pixels = to_pixels(image, PROCESSOR)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 12, 16))
    torch.testing.assert_close(normalize(pixels[None], PROCESSOR), pipeline_pixels(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width, height", [(1, 1), (1, 40), (40, 1), (7, 13), (16, 12), (300, 200)])
def test_training_sees_the_pixels_of_the_pipeline_at_odd_sizes(width, height, pipeline_pixels):
    image = noise(width=width, height=height)
    pixels = to_pixels(image, PROCESSOR)
    torch.testing.assert_close(normalize(pixels[None], PROCESSOR), pipeline_pixels(image), rtol=0, atol=1e-6)


def test_training_sees_the_files_of_a_folder_as_the_pipeline_does(image_folder, pipeline_pixels):
    images = load_labeled_images(str(image_folder), validation_split="test")
    tensors = CachedImages(images.train, images.image_column, images.label_column, PROCESSOR)
    files = sorted(image_folder.glob("train/*/*"))
    assert len(files) == len(tensors) == 21
    seen = normalize(tensors.pixels, PROCESSOR)
    for file, pixels in zip(files, seen):
        error = (pixels - pipeline_pixels(str(file))[0]).abs().max()
        assert error <= 1e-6, f"{file.name}: off by {error}"


def test_normalize_is_linear_in_the_pixels():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    normalized = normalize(pixels, PROCESSOR)
    assert normalized.dtype == torch.float32
    # mean 0.4, 0.5, 0.6 and standard deviation 0.5
    expected = [[-0.8, -0.4, 1.2], [-1.0, -0.6, 1.0], [-1.2, -0.8, 0.8]]
    torch.testing.assert_close(normalized[0, :, 0], torch.tensor(expected), rtol=0, atol=1e-6)


def test_cached_images_give_single_images_and_whole_batches(digits):
    tensors = CachedImages(digits.validation.select(range(5)), "image", "label", PROCESSOR)
    assert len(tensors) == 5
    pixels, labels = tensors.__getitems__([3, 1])
    assert labels.tolist() == [digits.validation[3]["label"], digits.validation[1]["label"]]
    for row, index in enumerate([3, 1]):
        single_pixels, single_label = tensors[index]
        assert torch.equal(single_pixels, pixels[row]) and single_label == labels[row]
        assert torch.equal(single_pixels, to_pixels(digits.validation[index]["image"], PROCESSOR))


# ---- the three ways to the same tensors ----


def load(folder: Path, streaming: bool = False, split: str = "train"):
    images = load_labeled_images(str(folder), validation_split="test", streaming=streaming)
    return getattr(images, split)


def items(dataset: torch.utils.data.Dataset, num_workers: int = 0) -> list[tuple[torch.Tensor, int]]:
    """All images and labels, by batches of four."""
    whole = None if isinstance(dataset, StreamedImages) else loaders._whole_batch
    batches = list(DataLoader(dataset, 4, num_workers=num_workers, collate_fn=whole))
    assert all(pixels.dtype == torch.uint8 and labels.dtype == torch.int64 for pixels, labels in batches)
    return [(one, label.item()) for pixels, labels in batches for one, label in zip(pixels, labels)]


def assert_same_items(found: list, expected: list) -> None:
    assert [label for _, label in found] == [label for _, label in expected]
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(found, expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoded_and_streamed_images_are_those_that_are_kept(image_folder, num_workers):
    kept = items(CachedImages(load(image_folder), "image", "label", PROCESSOR))
    assert len(kept) == 21
    assert_same_items(items(DecodedImages(load(image_folder), "image", "label", PROCESSOR), num_workers), kept)
    streamed = StreamedImages(load(image_folder, streaming=True), "image", "label", PROCESSOR)
    found = items(streamed, min(num_workers, 1))  # more of them take turns: another order
    assert_same_items(found, kept)


# ---- a stream ----


def image_of(number: int) -> Image.Image:
    return Image.new("L", (8, 8), number)


@pytest.fixture
def numbered_folder(tmp_path, monkeypatch) -> Path:
    """Images whose pixels all have the number of the image, over four files of ten rows; and a test split."""
    # datasets waits this many seconds at the end of a shuffled stream of several Parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # later releases wait
    folder = tmp_path / "numbered"
    folder.mkdir()
    for split, numbers in {"train": range(40), "test": range(40, 52)}.items():
        rows = {
            "image": [image_of(number) for number in numbers],
            "label": [("even", "odd")[number % 2] for number in numbers],
        }
        dataset = Dataset.from_dict(rows).cast_column("image", ImageFeature()).class_encode_column("label")
        for i in range(0, len(rows["label"]), 10):
            dataset.select(range(i, min(i + 10, len(dataset)))).to_parquet(folder / f"{split}-{i // 10}.parquet")
    return folder


def streamed(folder: Path, rank: int = 0, num_processes: int = 1, **flags: Any) -> StreamLoader:
    """The training loader of one of several processes, of which the others are never the first to run out."""
    words = {**FLAGS, "dataset_name": folder, "streaming": True, "validation_split": "test", "image_size": 16, **flags}
    args, overrides = parse_arguments(train.TrainingArguments, "", command_line(**words))
    images = load_labeled_images(str(folder), validation_split="test", streaming=True)
    _, processor = setup.create_model(args, overrides, images.label_names)
    accelerator = SimpleNamespace(
        process_index=rank, num_processes=num_processes, device=torch.device("cpu"), gather=lambda tensor: tensor
    )
    return loaders.stream_loaders(args, images, processor, accelerator)[0]


def numbers(loader: StreamLoader, epoch: int = 0) -> list[int]:
    loader.set_epoch(epoch)
    return [int(pixels[0, 0, 0]) for batch, _ in loader for pixels in batch]


def test_stream_is_shuffled_anew_in_every_epoch_and_the_same_each_time(numbered_folder):
    loader = streamed(numbered_folder, per_device_train_batch_size=5)
    first, second = numbers(loader, 0), numbers(loader, 1)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert numbers(streamed(numbered_folder, per_device_train_batch_size=5), 1) == second
    assert numbers(streamed(numbered_folder, per_device_train_batch_size=5, seed=1), 1) != second


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [2, 3])  # whole files for each of two, every third row for each of three
def test_stream_gives_every_image_to_one_process_once_per_epoch(numbered_folder, num_processes, num_workers):
    flags = {"per_device_train_batch_size": 1, "dataloader_num_workers": num_workers}
    for epoch in (0, 1):
        parts = [
            numbers(streamed(numbered_folder, rank, num_processes, **flags), epoch) for rank in range(num_processes)
        ]
        assert sorted(sum(parts, [])) == list(range(40))
        assert min(map(len, parts)) > 10


def test_stream_gives_all_whole_batches_however_many_workers_read_it(numbered_folder):
    for num_workers in (0, 1, 2):
        loader = streamed(numbered_folder, per_device_train_batch_size=8, dataloader_num_workers=num_workers)
        assert [len(labels) for _, labels in loader] == [8] * 5  # of 40 images


STREAM = {
    **FLAGS,
    "streaming": True,
    "validation_split": "test",
    "max_train_samples": None,
    "max_train_steps": 7,  # two epochs of three steps and one more
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "fusion_tokens": 1,
    "mixup_alpha": 0.8,
    "logging_steps": 1,
}


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3)), 5])
def test_stream_that_was_stopped_goes_on_as_if_nothing_had_happened(numbered_folder, tmp_path, monkeypatch, step):
    flags = {**STREAM, "dataset_name": numbered_folder, "checkpointing_steps": 1}
    train_here(tmp_path / "whole", **flags)

    with monkeypatch.context() as patch:
        update = trainer.Trainer._train_batch

        def killed(self, *args):
            if self.position.step == step:
                raise KeyboardInterrupt
            return update(self, *args)

        patch.setattr(trainer.Trainer, "_train_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "out", **flags)
    train_here(tmp_path / "out", **flags, resume_from_checkpoint="latest")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    logs = [without_time(read_metrics(tmp_path / name)) for name in ("whole", "out")]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0] if "epoch" not in record] == list(range(1, 8))


def test_stream_without_a_whole_batch_is_an_error(numbered_folder, tmp_path):
    flags = {**STREAM, "dataset_name": numbered_folder, "per_device_train_batch_size": 41}
    with pytest.raises(ValueError, match="--per_device_train_batch_size 41.*stream"):
        train_here(tmp_path / "out", **flags)


# ---- corrupt images ----


@pytest.fixture
def corrupt_folder(image_folder) -> Path:
    """The folder of images with three more dogs, at 21, 22 and 23, none of which can be read."""
    dogs = image_folder / "train" / "dog"
    noise(width=40, height=40).save(dogs / "x1 truncated.png")
    whole = (dogs / "x1 truncated.png").read_bytes()
    (dogs / "x1 truncated.png").write_bytes(whole[: len(whole) // 2])
    (dogs / "x2 text.png").write_text("not an image")
    (dogs / "x3 empty.png").touch()
    return image_folder


CORRUPT = {21: "x1 truncated.png", 22: "x2 text.png", 23: "x3 empty.png"}
KINDS = {"kept": CachedImages, "decoded": DecodedImages, "streamed": StreamedImages}
every_kind = pytest.mark.parametrize("kind", KINDS)


def read(kind: str, folder: Path, max_corrupt: int) -> list[tuple[torch.Tensor, int]]:
    rows = load(folder, streaming=kind == "streamed")
    return items(KINDS[kind](rows, "image", "label", PROCESSOR, max_corrupt))


@every_kind
def test_corrupt_images_are_skipped_and_named(corrupt_folder, caplog, kind):
    found = read(kind, corrupt_folder, max_corrupt=3)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    for message, (index, name) in zip(messages, CORRUPT.items()):
        assert message.startswith(f"skipped: image {index} (") and f"/{name}) cannot be read: " in message

    for name in CORRUPT.values():
        (corrupt_folder / "train" / "dog" / name).unlink()
    readable = items(CachedImages(load(corrupt_folder), "image", "label", PROCESSOR))
    # One that is asked for by its number is replaced by the next one that can be read: the first of all.
    assert_same_items(found, readable + 3 * readable[:1] if kind == "decoded" else readable)


@every_kind
def test_one_more_corrupt_image_than_allowed_is_an_error(corrupt_folder, kind):
    with pytest.raises(CorruptImageError) as error:
        read(kind, corrupt_folder, max_corrupt=2)
    message = str(error.value)
    assert message.startswith("image 23 (") and "/x3 empty.png) cannot be read: " in message
    assert message.endswith("--max_corrupt_images allows 2")


@pytest.mark.parametrize("kind", ["decoded", "streamed"])
def test_corrupt_image_counts_once_however_often_it_is_read(corrupt_folder, kind):
    images = KINDS[kind](load(corrupt_folder, kind == "streamed"), "image", "label", PROCESSOR, max_corrupt=3)
    assert len({len(items(images)) for _ in range(3)}) == 1


@pytest.mark.parametrize("kind", ["kept", "decoded"])
def test_nothing_but_corrupt_images_is_an_error(tmp_path, kind):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            (tmp_path / "pets" / split / label / "empty.png").touch()
    with pytest.raises(CorruptImageError, match="none of the images can be read"):
        read(kind, tmp_path / "pets", max_corrupt=10)


def test_row_without_an_image_is_a_corrupt_image(caplog):
    rows = Dataset.from_dict({"image": [noise(), None, noise(seed=1)], "label": [0, 1, 2]})
    images = CachedImages(rows.cast_column("image", ImageFeature()), "image", "label", PROCESSOR, max_corrupt=1)
    assert images.labels.tolist() == [0, 2]
    assert [record.message.split(":")[0] for record in caplog.records] == ["skipped"]
    assert "image 1 cannot be read" in caplog.text


# ---- whole runs on a folder with corrupt images ----

PETS = {
    **STREAM,
    "streaming": None,
    "max_train_steps": 5,  # in the third epoch: a corrupt image is read three times
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 10,
    "max_corrupt_images": 3,
}


@pytest.mark.parametrize(
    "flags, num_images",
    [
        ({}, 21),
        ({"max_cached_mib": 0, "dataloader_num_workers": 0}, 24),
        ({"max_cached_mib": 0, "dataloader_num_workers": 2}, 24),
        ({"streaming": True}, None),
    ],
    ids=["kept", "decoded", "decoded by workers", "streamed"],
)
def test_training_goes_on_without_the_corrupt_images(corrupt_folder, tmp_path, flags, num_images):
    results = train_here(tmp_path / "out", **{**PETS, "dataset_name": corrupt_folder, **flags})
    assert (results["steps"], results["epochs"], results["train_images"]) == (
        5,
        3 if "streaming" in flags else 2.5,
        num_images,
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("flags", [{}, {"max_cached_mib": 0}, {"streaming": True}], ids=str)
def test_training_ends_at_one_corrupt_image_too_many(corrupt_folder, tmp_path, flags):
    flags = {**PETS, "dataset_name": corrupt_folder, "max_corrupt_images": 0, "dataloader_num_workers": 1, **flags}
    with pytest.raises(CorruptImageError, match="/x[123] .*--max_corrupt_images allows 0"):
        train_here(tmp_path / "out", **flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_ways_to_read_do_not_change_the_training(image_folder, tmp_path):
    ways = {"kept": {}, "decoded": {"max_cached_mib": 0, "dataloader_num_workers": 2}}
    for name, flags in ways.items():
        train_here(tmp_path / name, **{**PETS, "dataset_name": image_folder, **flags})
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ways]
    assert weights[0] == weights[1]


def test_stream_whose_epoch_ends_within_a_step_goes_on_from_there(numbered_folder, tmp_path):
    # 5 batches in an epoch, 2 in a step: the last step of an epoch is of one batch
    flags = {**STREAM, "dataset_name": numbered_folder, "per_device_train_batch_size": 8}
    flags |= {"dataloader_num_workers": 0, "checkpointing_steps": "epoch"}
    train_here(tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    first, *later = sorted((tmp_path / "resumed" / "checkpoints").iterdir())
    assert first.name == "step_000003"
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    train_here(tmp_path / "resumed", **flags, resume_from_checkpoint="latest")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_streams_of_unequal_length_end_their_epochs_together(numbered_folder, tmp_path):
    # Three files, so that two processes take every other row: 15 and 14 images, which make 3 and 2 batches of 5
    (numbered_folder / "train-3.parquet").unlink()
    last = Dataset.from_parquet(str(numbered_folder / "train-2.parquet"))
    last.select(range(9)).to_parquet(str(numbered_folder / "train-2.parquet"))
    flags = {**STREAM, "dataset_name": numbered_folder, "per_device_train_batch_size": 5, "max_train_steps": 4}
    flags |= {"evaluation_epochs": 1, "dataloader_num_workers": 0, "gradient_accumulation_steps": 1}
    process = run_in_two_processes(tmp_path / "out", **flags)
    assert process.returncode == 0, process.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "out") if "epoch" in record] == [2, 4]
    assert read_results(tmp_path / "out")["num_processes"] == 2
