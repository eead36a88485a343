"""What a teacher sees is what its own image processor makes of the same image."""

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.teacher.input import TeacherInput
from support.helpers import noise

STUDENT = ViTImageProcessorPil(size={"height": 24, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
PROCESSORS = {
    "same": STUDENT,
    "larger, bilinear": ViTImageProcessorPil(size={"height": 48, "width": 60}, resample=2),
    "larger, bicubic": ViTImageProcessorPil(size={"height": 96, "width": 96}, resample=3, image_mean=[0.1, 0.2, 0.3]),
    "smaller, bicubic": ViTImageProcessorPil(size={"height": 12, "width": 20}, resample=3),
    "nearest": ViTImageProcessorPil(size={"height": 48, "width": 64}, resample=0),
    "not normalised": ViTImageProcessorPil(size={"height": 24, "width": 32}, do_normalize=False),
    "not resized": ViTImageProcessorPil(do_resize=False),
    "cropped": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_batches_are_as_the_processor_makes_them(name):
    teachers = PROCESSORS[name]
    images = [noise(width=32, height=24, seed=seed) for seed in range(3)]
    prepare = TeacherInput(STUDENT, teachers)
    found = prepare(STUDENT(images, return_tensors="pt")["pixel_values"])
    expected = teachers(images, return_tensors="pt")["pixel_values"]
    assert found.shape == expected.shape
    # PIL rounds to whole levels after each of its two passes
    std = teachers.image_std if teachers.do_normalize else [1, 1, 1]
    levels = (found - expected).abs().amax(dim=(0, 2, 3)) * torch.tensor(std) * 255
    assert levels.max() < 2.5, levels


def test_images_of_the_same_kind_stay_as_they_are():
    pixel_values = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 24, 32)).astype(np.float32))
    assert TeacherInput(STUDENT, STUDENT)(pixel_values) is pixel_values


def test_processor_that_does_more_is_refused():
    # Enlarges by 256 / 224 and crops, which its fields do not say in the usual way
    teachers = ConvNextImageProcessorPil(size={"shortest_edge": 56}, crop_pct=0.5)
    with pytest.raises(ValueError, match="ConvNextImageProcessorPil"):
        TeacherInput(STUDENT, teachers)


def test_interpolation_that_torch_does_not_have_is_refused():
    with pytest.raises(ValueError, match="resample=1 of its image processor"):
        TeacherInput(STUDENT, ViTImageProcessorPil(size={"height": 48, "width": 48}, resample=1))
