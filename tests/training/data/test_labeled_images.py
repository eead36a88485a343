"""Datasets of every kind that training reads: splits, columns, labels, and what is wrong with them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from fambav_training.data.labeled_images import DataError, LabeledImages, load_labeled_images
from support.helpers import noise

CIFAR100 = Path(__file__).parents[3] / ".." / "shared" / "cifar100"


@pytest.fixture
def digits() -> LabeledImages:
    return load_labeled_images("digits")


@pytest.fixture
def parquet_folder(tmp_path) -> Path:
    """Columns as in CIFAR-100, in one split of 50 images: 25, 15 and 10 of three classes, sorted."""
    features = Features(
        {
            "id": Value("int64"),
            "img": ImageFeature(),
            "fine_label": ClassLabel(names=["apple", "bear", "clock"]),
            "coarse_label": ClassLabel(names=["alive", "dead"]),
        }
    )
    fine = [0] * 25 + [1] * 15 + [2] * 10
    rows = {
        "id": list(range(50)),
        "img": [noise(seed=i) for i in range(50)],
        "fine_label": fine,
        "coarse_label": [label // 2 for label in fine],
    }
    (tmp_path / "fruit").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "fruit" / "train-00000-of-00001.parquet")
    return tmp_path / "fruit"


# ---- loading ----


def test_digits(digits):
    assert (len(digits.train), len(digits.validation)) == (1437, 360)
    assert digits.label_names == list("0123456789")
    image = digits.train[0][digits.image_column]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert 200 < np.max([np.asarray(image) for image in digits.train[:50][digits.image_column]]) <= 255


def test_local_image_folder(image_folder):
    images = load_labeled_images(str(image_folder), validation_split="test")
    assert (images.image_column, images.label_column, images.label_names) == ("image", "label", ["cat", "dog"])
    assert Counter(images.train["label"][:]) == {0: 15, 1: 6}
    assert Counter(images.validation["label"][:]) == {0: 2, 1: 1}


def test_columns_are_found_by_type(parquet_folder):
    images = load_labeled_images(str(parquet_folder))
    assert (images.image_column, images.label_column) == ("img", "fine_label")
    assert images.label_names == ["apple", "bear", "clock"]


def test_columns_are_found_by_name(parquet_folder):
    images = load_labeled_images(str(parquet_folder), image_column="img", label_column="coarse_label")
    assert (images.label_column, images.label_names) == ("coarse_label", ["alive", "dead"])


def test_cifar100():
    if not CIFAR100.exists():
        pytest.skip("the real CIFAR-100 is not at ../shared/cifar100 beside the repository")
    images = load_labeled_images(str(CIFAR100), validation_split="test")
    assert (len(images.train), len(images.validation)) == (50_000, 10_000)
    assert len(images.label_names) == 100 and images.label_names[:2] == ["apple", "aquarium_fish"]
    example = images.train[0]
    assert example["img"].size == (32, 32) and 0 <= example["fine_label"] < 100


# ---- the validation images that are set aside ----


def test_carved_out_validation_is_stratified_and_disjoint_from_training(parquet_folder):
    images = load_labeled_images(str(parquet_folder))
    assert sorted(images.train["id"][:] + images.validation["id"][:]) == list(range(50))
    assert Counter(images.validation["fine_label"][:]) == {0: 5, 1: 3, 2: 2}


def test_carved_out_validation_depends_on_the_seed_alone(parquet_folder):
    first, again, other = (load_labeled_images(str(parquet_folder), seed=seed) for seed in (0, 0, 1))
    assert first.validation["id"][:] == again.validation["id"][:]
    assert first.train["id"][:] == again.train["id"][:]
    assert set(first.validation["id"]) != set(other.validation["id"])


def test_given_validation_split_is_used_whole_and_train_too(image_folder):
    images = load_labeled_images(str(image_folder), train_split="test", validation_split="train")
    assert (len(images.train), len(images.validation)) == (3, 21)


# ---- labels that are integers or text ----


def write_labels(folder: Path, **labels_of_splits: list) -> str:
    """A dataset with these labels, as they are, in each split. Every image is of its own."""
    folder.mkdir()
    for split, labels in labels_of_splits.items():
        rows = {"image": [noise(seed=i) for i in range(len(labels))], "label": labels}
        dataset = Dataset.from_dict(rows).cast_column("image", ImageFeature())
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize(
    "train, test, names",
    [
        (["dog", "cat", "dog", "eel"], ["eel", "cat"], ["cat", "dog", "eel"]),
        ([10, 9, 10, 300], [300, 9], ["9", "10", "300"]),  # in the order of numbers
        ([-1, 0, 3, 0], [3, -1], ["-1", "0", "3"]),
    ],
    ids=["text", "integers", "negative integers"],
)
def test_labels_become_names(tmp_path, train, test, names):
    images = load_labeled_images(write_labels(tmp_path / "pets", train=train, test=test), validation_split="test")
    assert images.label_names == names
    for split, labels in ((images.train, train), (images.validation, test)):
        assert split.features["label"] == ClassLabel(names=names)
        assert [names[label] for label in split["label"]] == [str(label) for label in labels]
        assert [np.asarray(image).tolist() for image in split["image"]] == [
            np.asarray(noise(seed=i)).tolist() for i in range(len(labels))
        ]


def test_labels_become_names_and_some_images_are_set_aside(tmp_path):
    images = load_labeled_images(write_labels(tmp_path / "pets", train=["dog"] * 10 + ["cat"] * 5))
    assert images.label_names == ["cat", "dog"]
    assert Counter(images.train["label"][:]) == {0: 4, 1: 8}
    assert Counter(images.validation["label"][:]) == {0: 1, 1: 2}


@pytest.mark.parametrize("train, test, unknown", [(["a", "b"], ["b", "c"], "'c'"), ([1, 2], [2, 3], "'3'")], ids=str)
def test_label_of_validation_that_training_does_not_know_is_refused(tmp_path, train, test, unknown):
    folder = write_labels(tmp_path / "pets", train=train, test=test)
    assert_refused([f"label {unknown}", "validation"], folder, validation_split="test")


def test_text_labels_of_a_stream_are_refused(tmp_path):
    folder = write_labels(tmp_path / "pets", train=["a", "b"], test=["a"])
    assert_refused(["--label_column_name label", "stream"], folder, validation_split="test", streaming=True)


def write_class_labels(folder: Path, **labels_of_splits: list[int | None]) -> str:
    """A dataset with two classes, and numbers of them that need not exist."""
    folder.mkdir()
    for split, labels in labels_of_splits.items():
        rows = {"image": [noise(seed=i) for i in range(len(labels))], "label": labels}
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_labels_without_a_name_are_refused_with_image_and_split(tmp_path):
    unlabeled = write_class_labels(tmp_path / "unlabeled", train=[0, 1, 0], test=[1, -1, -1])
    expected = ["label -1 of image 1 in split 'test'", "0 to 1", "2 such images"]
    assert_refused(expected, unlabeled, validation_split="test")
    assert_refused(["label -1 of image 1 in split 'test'"], unlabeled, train_split="test", validation_split="train")
    assert load_labeled_images(unlabeled, train_split="train", validation_split="train").label_names == ["cat", "dog"]


def test_missing_labels_are_refused_with_image_and_split(tmp_path):
    missing = write_class_labels(tmp_path / "missing", train=[0, 1, None, 0], test=[0])
    assert_refused(["of image 2 in split 'train'", "1 such images"], missing, validation_split="test")


# ---- errors: the flag, the value, and what there is ----


def assert_refused(words: list[str], *args, **kwargs) -> None:
    with pytest.raises(DataError) as error:
        load_labeled_images(*args, **kwargs)
    for word in words:
        assert word in str(error.value)


def test_missing_dataset(tmp_path):
    assert_refused(["--dataset_name", "no/such", "Hub id"], "no/such")
    missing = str(tmp_path / "missing")
    assert_refused(["--dataset_name", missing, "does not exist"], missing)


def test_folder_without_images(tmp_path):
    assert_refused(["--dataset_name", str(tmp_path), "local folder"], str(tmp_path))
    (tmp_path / "broken.parquet").write_text("not parquet")
    assert_refused(["--dataset_name", str(tmp_path), "local folder"], str(tmp_path))


def test_missing_split(image_folder):
    expected = ["--train_split", "'training'", "['test', 'train']"]
    assert_refused(expected, str(image_folder), train_split="training")
    expected = ["--validation_split", "'validation'", "['test', 'train']"]
    assert_refused(expected, str(image_folder), validation_split="validation")


def test_missing_column(parquet_folder):
    columns = ["img", "fine_label", "coarse_label"]
    assert_refused(["--image_column_name", "image", *columns], str(parquet_folder), image_column="image")
    assert_refused(["--label_column_name", "label", *columns], str(parquet_folder), label_column="label")


def test_column_of_the_wrong_type(parquet_folder):
    expected = ["--image_column_name", "fine_label", "ClassLabel"]
    assert_refused(expected, str(parquet_folder), image_column="fine_label")
    assert_refused(["--label_column_name", "img", "Image"], str(parquet_folder), label_column="img")


def test_dataset_without_labels(tmp_path):
    noise().save(tmp_path / "one.png")
    noise().save(tmp_path / "two.png")
    assert_refused(["--label_column_name", "class labels", "image"], str(tmp_path))


def test_class_too_small_to_set_aside(tmp_path):
    for label, count in {"cat": 9, "dog": 1}.items():
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(count):
            noise(seed=i).save(tmp_path / "train" / label / f"{i}.png")
    assert_refused(["--validation_split"], str(tmp_path))


def test_missing_labels_are_refused(tmp_path):
    rows = {"image": [noise(seed=i) for i in range(4)], "label": ["cat", "dog", None, "cat"]}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "train.parquet")
    assert_refused(["--label_column_name label", "image 2"], str(tmp_path))
