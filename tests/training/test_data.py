"""Datasets of every kind that training reads, and pixels that are those of the pipeline."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from data import DataError, ImageTensors, LabeledImages, load_labeled_images, normalize, to_pixels
from modeling_fambav import FambaVConfig, FambaVForImageClassification

CIFAR100 = Path(__file__).parents[2] / ".." / "shared" / "cifar100"

PROCESSOR = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=[0.4, 0.5, 0.6], do_convert_rgb=True)


def noise(mode: str = "RGB", width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
    """A random image of any mode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.fixture
def digits() -> LabeledImages:
    return load_labeled_images("digits")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Folders train/{cat,dog} and test/{cat,dog} with files of many kinds, and more cats than dogs."""
    for split, counts in {"train": {"cat": 8, "dog": 6}, "test": {"cat": 2, "dog": 1}}.items():
        for label, count in counts.items():
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise(seed=i).save(folder / f"{i}.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turn by 90 degrees
    cats = tmp_path / "pets" / "train" / "cat"
    noise("L").save(cats / "grey.png")
    noise("RGBA").save(cats / "transparent.png")
    noise("P").save(cats / "palette.png", transparency=0)
    noise("I;16").save(cats / "16 bits.png")
    noise("CMYK").save(cats / "print.jpg")
    noise(width=31, height=5).save(cats / "odd.bmp")
    noise(width=24, height=16).save(cats / "rotated.jpg", exif=rotated)
    return tmp_path / "pets"


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
    tensors = ImageTensors(images.train.select(range(4)), images.image_column, images.label_column, PROCESSOR)
    assert tensors.pixels.shape == (4, 3, 12, 16) and tensors.pixels.float().std() > 20
    assert all(0 <= label < 100 for label in tensors.labels)


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
    assert_refused(["--label_column_name", "ClassLabel", "image"], str(tmp_path))


def test_class_too_small_to_set_aside(tmp_path):
    for label, count in {"cat": 9, "dog": 1}.items():
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(count):
            noise(seed=i).save(tmp_path / "train" / label / f"{i}.png")
    assert_refused(["--validation_split"], str(tmp_path))


# ---- pixels ----


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
    tensors = ImageTensors(images.train, images.image_column, images.label_column, PROCESSOR)
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


def test_tensors_give_single_images_and_whole_batches(digits):
    tensors = ImageTensors(digits.validation.select(range(5)), "image", "label", PROCESSOR)
    assert len(tensors) == 5
    pixels, labels = tensors.__getitems__([3, 1])
    assert labels.tolist() == [digits.validation[3]["label"], digits.validation[1]["label"]]
    for row, index in enumerate([3, 1]):
        single_pixels, single_label = tensors[index]
        assert torch.equal(single_pixels, pixels[row]) and single_label == labels[row]
        assert torch.equal(single_pixels, to_pixels(digits.validation[index]["image"], PROCESSOR))
