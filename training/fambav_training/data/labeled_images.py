"""Image datasets: loading them, and finding their splits, images and labels."""

from dataclasses import dataclass

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from datasets import Image as ImageFeature
from PIL import Image

from fambav_training.sources import kind_of

DIGITS = "digits"
_VALIDATION_SHARE = 0.2


class DataError(ValueError):
    """A dataset, split or column that is missing or does not hold images with labels."""


@dataclass(frozen=True)
class LabeledImages:
    """The splits of a dataset and what their columns mean. Streams have the type `IterableDataset`."""

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset
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
    streaming: bool = False,
) -> LabeledImages:
    """Load a dataset and find its images and labels.

    Args:
        dataset_name: `"digits"`, a local folder in any layout that `load_dataset` reads, or a Hub id.
        image_column: name of the column with images; found by its type if not given.
        label_column: name of the column with labels, class labels, integers or text; if not given, the first of type
            ClassLabel, or else one that is called `label`.
        train_split: name of the split to train on.
        validation_split: name of the split to score. If not given, a fifth of the training split is set aside, so
            that choices are not made on a test split.
        seed: of that division.
        streaming: read rows while iterating, instead of the whole dataset first.

    Raises:
        DataError: if the dataset, a split or a column is missing or of the wrong type, or a label has no name.
    """
    splits = _digits() if dataset_name == DIGITS else _load(dataset_name, streaming)
    for flag, name in (("train_split", train_split), ("validation_split", validation_split)):
        if name is not None and name not in splits:
            raise DataError(f"--{flag} {name!r}: expected one of {sorted(splits)}, the splits of {dataset_name!r}")
    train = splits[train_split]
    if train.features is None:
        raise DataError(f"--streaming: {dataset_name!r} does not say which columns it has")
    image_column = _find_image_column(train, image_column)
    label_column = _find_label_column(train, label_column)
    validation = None if validation_split is None else splits[validation_split]
    train, validation = _with_class_labels(train, validation, label_column)
    names = train.features[label_column].names
    if not streaming:
        _check_labels(train, label_column, train_split, len(names))
    if validation is None:
        try:
            parts = train.train_test_split(_VALIDATION_SHARE, seed=seed, stratify_by_column=label_column)
        except ValueError as error:
            raise DataError(f"too few images to set some aside, give --validation_split: {error}") from error
        train, validation = parts["train"], parts["test"]
    elif not streaming:
        _check_labels(validation, label_column, validation_split, len(names))
    return LabeledImages(train, validation, image_column, label_column, names)


def random_subset(dataset: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """At most so many images, chosen by the seed, since datasets are often sorted by class; all if None."""
    if max_samples is None:
        return dataset
    return dataset.shuffle(seed=seed).select(range(min(max_samples, len(dataset))))


def _load(dataset_name: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    try:
        return load_dataset(dataset_name, streaming=streaming)
    except Exception as error:  # load_dataset raises whatever its many readers raise
        kind = kind_of(dataset_name)
        raise DataError(f"--dataset_name {dataset_name}: this {kind} cannot be loaded: {error}") from error


def _digits() -> DatasetDict:
    """The 1,797 real handwritten digits that come with scikit-learn: 8 x 8 grey pixels, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    rows = {"image": [Image.fromarray(array) for array in pixels], "label": digits.target.tolist()}
    return DatasetDict(train=Dataset.from_dict(rows, features=features))


def _find_image_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    candidates = [column for column, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    if name is None and candidates:
        return candidates[0]
    if name not in candidates:
        raise DataError(
            f"--image_column_name{_given(name)}: expected a column of type Image, the columns are {_columns(dataset)}"
        )
    return name


def _find_label_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    features = dataset.features
    if name is None:
        class_labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        name = next(iter([*class_labels, *(column for column in ("label", "labels") if column in features)]), None)
    feature = features.get(name)
    is_value = isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or feature.dtype == "string")
    if not isinstance(feature, ClassLabel) and not is_value:
        raise DataError(
            f"--label_column_name{_given(name)}: expected a column of class labels, integers or text, "
            f"the columns are {_columns(dataset)}"
        )
    return name


def _given(name: str | None) -> str:
    return "" if name is None else f" {name}"


def _columns(dataset: Dataset | IterableDataset) -> dict[str, str]:
    return {column: type(feature).__name__ for column, feature in dataset.features.items()}


def _with_class_labels(train, validation, label_column: str):
    """Both splits with a ClassLabel column, named by the values of the training split."""
    if isinstance(train.features[label_column], ClassLabel):
        return train, validation
    if isinstance(train, IterableDataset):
        raise DataError(f"--label_column_name {label_column}: expected a column of class labels in a stream")
    values = train.unique(label_column)
    if None in values:
        row = train[label_column][:].index(None)
        raise DataError(f"--label_column_name {label_column}: image {row} of the training split has no label")
    names = [str(value) for value in sorted(values)]
    index_of = {name: index for index, name in enumerate(names)}
    label = ClassLabel(names=names)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        unknown = {str(value) for value in rows[label_column]} - index_of.keys()
        if unknown:
            raise DataError(
                f"label {sorted(unknown)[0]!r} of the validation split: expected one of the training split"
            )
        return {label_column: [index_of[str(value)] for value in rows[label_column]]}

    def encoded(dataset: Dataset) -> Dataset:
        features = Features({**dataset.features, label_column: label})
        return dataset.map(encode, batched=True, input_columns=None, features=features, desc="labels")

    return encoded(train), None if validation is None else encoded(validation)


def _check_labels(dataset: Dataset, label_column: str, split: str, num_labels: int) -> None:
    """Labels outside the names, such as the -1 of test splits without labels, would train on nonsense."""
    labels = np.asarray(dataset.with_format("numpy")[label_column][:])
    wrong = np.flatnonzero((labels < 0) | (labels >= num_labels) | (labels != labels))
    if len(labels) == 0:
        raise DataError(f"split {split!r} has no image")
    if len(wrong):
        raise DataError(
            f"label {labels[wrong[0]]} of image {wrong[0]} in split {split!r}: expected 0 to {num_labels - 1} "
            f"({len(wrong)} such images)"
        )
