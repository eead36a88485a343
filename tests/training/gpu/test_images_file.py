"""Images for a machine without a network: which are taken, and that the file gives them back."""

import hashlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import save_file

from fambav_training.gpu import images_file


@pytest.fixture
def dataset_folder(tmp_path):
    """Three classes, eight training and four test images each, every image of one number."""

    def split(number: int, first: int) -> Dataset:
        pixels = [np.full((6, 6, 3), first + i, np.uint8) for i in range(3 * number)]
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
        return Dataset.from_dict({"image": pixels, "label": [i % 3 for i in range(3 * number)]}, features)

    for name, number, first in (("train", 8, 0), ("test", 4, 100)):
        (tmp_path / "data").mkdir(exist_ok=True)
        split(number, first).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    return tmp_path / "data"


def test_the_first_images_of_every_class_come_back(dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(images_file, "TRAIN_IMAGES_PER_CLASS", 5)
    monkeypatch.setattr(images_file, "TEST_IMAGES_PER_CLASS", 2)
    written = images_file.prepare(str(dataset_folder), tmp_path / "new" / "images", "image", "label", "test")
    read = images_file.read(tmp_path / "new" / "images")
    assert read.origin == written.origin == f"{dataset_folder}, the first 5 training and 2 test images of every class"
    assert read.digest == written.digest == hashlib.sha256((tmp_path / "new" / "images").read_bytes()).hexdigest()
    assert all(torch.equal(one, other) for one, other in zip(read[:4], written[:4]))
    assert read.train_images.dtype == torch.uint8 and read.train_images.shape == (15, 3, 6, 6)
    assert read.train_images[:, 0, 0, 0].tolist() == list(range(15))
    assert read.test_images[:, 2, 5, 5].tolist() == list(range(100, 106))
    assert read.train_labels.tolist() == [0, 1, 2] * 5 and read.test_labels.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("train_images", torch.zeros(4, 3, 8, 8), "train_images: expected uint8 of .*, got float32 of"),
        ("train_images", torch.zeros(4, 8, 8).byte(), "train_images: expected uint8 of .*, got uint8 of"),
        ("test_images", torch.zeros(2, 3, 8, 6).byte(), "test_images: expected squares of one size"),
        ("test_images", torch.zeros(2, 3, 6, 6).byte(), "test_images: expected squares of one size"),
        ("train_labels", torch.zeros(3).long(), r"train_labels: expected int64 of \(4,\), got int64 of \(3,\)"),
        ("test_labels", torch.zeros(2), r"test_labels: expected int64 of \(2,\), got float32"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path, name, tensor, message):
    tensors = {"train_images": torch.zeros(4, 3, 8, 8).byte(), "train_labels": torch.zeros(4).long()}
    tensors |= {"test_images": torch.zeros(2, 3, 8, 8).byte(), "test_labels": torch.zeros(2).long()}
    save_file(tensors, tmp_path / "images", {"origin": "zeros"})
    images_file.read(tmp_path / "images")
    save_file({**tensors, name: tensor}, tmp_path / "images", {"origin": "zeros"})
    with pytest.raises(ValueError, match=message):
        images_file.read(tmp_path / "images")


def test_a_file_of_cifar100_fits_what_is_asked():
    pixels = 100 * (images_file.TRAIN_IMAGES_PER_CLASS + images_file.TEST_IMAGES_PER_CLASS) * 3 * 32 * 32
    assert pixels <= 40 * 2**20


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a file of --prepare"):
        images_file.read(path)
