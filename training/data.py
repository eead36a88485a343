"""Image datasets: loading, finding the columns, and images as uint8 tensors at the size of the model.

Decoding and resizing are done by the image processor that is saved with the model, so that `pipeline` later sees what
training saw. Rescaling and normalising wait until the batch is on its device (`normalize`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

DIGITS = "digits"
_VALIDATION_SHARE = 0.2


class DataError(ValueError):
    """A dataset, split or column that is missing or does not hold images with labels."""


@dataclass(frozen=True)
class LabeledImages:
    """The splits of a dataset and what their columns mean."""

    train: Dataset
    validation: Dataset
    image_column: str
    label_column: str
    label_names: list[str]


def load_labeled_images(
    dataset_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    seed: int = 0,
) -> LabeledImages:
    """Load a dataset and find its images and labels.

    Args:
        dataset_name: `"digits"`, a local folder in any layout that `load_dataset` reads, or a Hub id.
        image_column, label_column: names of the columns; found by their types if not given.
        train_split: name of the split to train on.
        validation_split: name of the split to score. If not given, a fifth of the training split is set aside, so
            that choices are not made on a test split.
        seed: of that division.

    Raises:
        DataError: if the dataset, a split or a column is missing or of the wrong type.
    """
    splits = _digits() if dataset_name == DIGITS else _load(dataset_name)
    for flag, name in (("train_split", train_split), ("validation_split", validation_split)):
        if name is not None and name not in splits:
            raise DataError(f"--{flag} {name!r}: expected one of {sorted(splits)}, the splits of {dataset_name!r}")
    train = splits[train_split]
    image_column = _find_column(train, "image_column_name", image_column, ImageFeature)
    label_column = _find_column(train, "label_column_name", label_column, ClassLabel)
    if validation_split is None:
        try:
            parts = train.train_test_split(_VALIDATION_SHARE, seed=seed, stratify_by_column=label_column)
        except ValueError as error:
            raise DataError(f"too few images to set some aside, give --validation_split: {error}") from error
        train, validation = parts["train"], parts["test"]
    else:
        validation = splits[validation_split]
    return LabeledImages(train, validation, image_column, label_column, train.features[label_column].names)


def _load(dataset_name: str) -> DatasetDict:
    try:
        return load_dataset(dataset_name)
    except Exception as error:  # load_dataset raises whatever its many readers raise
        kind = "local folder" if Path(dataset_name).exists() else "Hub id (or a local folder that does not exist)"
        raise DataError(f"--dataset_name {dataset_name}: this {kind} cannot be loaded: {error}") from error


def _digits() -> DatasetDict:
    """The 1,797 real handwritten digits that come with scikit-learn: 8 x 8 grey pixels, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    rows = {"image": [Image.fromarray(array) for array in pixels], "label": digits.target.tolist()}
    return DatasetDict(train=Dataset.from_dict(rows, features=features))


def _find_column(dataset: Dataset, flag: str, name: str | None, feature_type: type) -> str:
    candidates = [column for column, feature in dataset.features.items() if isinstance(feature, feature_type)]
    columns = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    if name is None:
        if not candidates:
            raise DataError(f"--{flag}: no column of type {feature_type.__name__} among {columns}")
        return candidates[0]
    if name not in candidates:
        raise DataError(
            f"--{flag} {name}: expected a column of type {feature_type.__name__}, the columns are {columns}"
        )
    return name


class ImageTensors(torch.utils.data.Dataset):
    """Images of a dataset as uint8 tensors, decoded once and kept in memory.

    An item is `(pixels (C, H, W) uint8, label)`; a list of indices gives a whole batch at once.
    """

    def __init__(self, dataset: Dataset, image_column: str, label_column: str, processor: BaseImageProcessor):
        self.labels = torch.tensor(dataset[label_column][:])
        self.pixels = torch.stack([to_pixels(image, processor) for image in dataset[image_column]])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


def to_pixels(image: Image.Image, processor: BaseImageProcessor) -> Tensor:
    """Convert to RGB and resize as the processor does: uint8 (C, H, W)."""
    batch = processor(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
    return batch["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)


def normalize(pixels: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Rescale and normalise a batch of uint8 pixels as the processor does: float32, same shape."""
    mean = pixels.new_tensor(processor.image_mean, dtype=torch.float32).view(-1, 1, 1)
    std = pixels.new_tensor(processor.image_std, dtype=torch.float32).view(-1, 1, 1)
    return (pixels * processor.rescale_factor - mean) / std
