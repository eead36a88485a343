"""Pixels: those of the pipeline, whether images are kept, decoded by workers or streamed, and corrupt images."""

import pytest
import torch
from transformers import pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from data import load_labeled_images
from helpers import noise
from modeling_fambav import FambaVConfig, FambaVForImageClassification
from pixels import CachedImages, normalize, to_pixels

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
