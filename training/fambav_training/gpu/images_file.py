"""A data set small enough to carry to a machine without a network: raw images and labels in one safetensors file."""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fambav_training.files import atomic_file

# Of CIFAR-100's 32 px, 37 MiB
TRAIN_IMAGES_PER_CLASS = 100
TEST_IMAGES_PER_CLASS = 25
_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


class Images(NamedTuple):
    """Images of one size `(n, 3, height, width)` (uint8) and labels `(n,)` (int64).

    Attributes:
        origin: where they are from.
        digest: SHA-256 of the file that holds them.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    origin: str
    digest: str


def prepare(
    dataset_name: str, path: Path, image_column: str | None, label_column: str | None, test_split: str
) -> Images:
    """Write the first images of every class, 100 to train on and 25 to score, and return them.

    Needs the package `datasets`, which a machine that only reads the file does not.

    Raises:
        DataError: if the dataset or a column is not there, see `load_labeled_images`.
        ValueError: if its images are of several sizes.
    """
    from fambav_training.data.labeled_images import load_labeled_images

    source = load_labeled_images(dataset_name, image_column, label_column, validation_split=test_split)
    tensors = []
    for split, number in ((source.train, TRAIN_IMAGES_PER_CLASS), (source.validation, TEST_IMAGES_PER_CLASS)):
        rows = _first_of_every_class(split[source.label_column], number)
        chosen = split.select(rows)
        pixels = [np.asarray(image.convert("RGB")) for image in chosen[source.image_column]]
        if len(sizes := {image.shape for image in pixels}) > 1:
            raise ValueError(f"{dataset_name}: images of {len(sizes)} sizes, expected one")
        tensors += [torch.from_numpy(np.stack(pixels)).movedim(3, 1).contiguous()]
        tensors += [torch.tensor(chosen[source.label_column])]
    numbers = f"{TRAIN_IMAGES_PER_CLASS} training and {TEST_IMAGES_PER_CLASS} test images"
    origin = f"{dataset_name}, the first {numbers} of every class"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        save_file(dict(zip(_NAMES, tensors)), new, {"origin": origin})
    return read(path)


def _first_of_every_class(labels: list[int], number: int) -> list[int]:
    rows = defaultdict(list)
    for row, label in enumerate(labels):
        if len(rows[label]) < number:
            rows[label].append(row)
    return sorted(row for chosen in rows.values() for row in chosen)


def read(path: Path) -> Images:
    """What `prepare` wrote.

    Raises:
        ValueError: if it is not such a file, or its images and labels do not belong together.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, origin = [file.get_tensor(name) for name in _NAMES], file.metadata()["origin"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of --prepare, {error}") from error
    for images, labels, part in ((*tensors[:2], "train"), (*tensors[2:], "test")):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{path}: {part}_images: expected uint8 of (n, 3, side, side), got {_described(images)}")
        if images.shape[2] != images.shape[3] or images.shape[2:] != tensors[0].shape[2:]:
            raise ValueError(f"{path}: {part}_images: expected squares of one size, got {_described(images)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"{path}: {part}_labels: expected int64 of ({len(images)},), got {_described(labels)}")
    return Images(*tensors, origin, hashlib.sha256(path.read_bytes()).hexdigest())


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"
