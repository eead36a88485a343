"""What a teacher sees: images as its own image processor makes them, from those that the student sees.

Augmented images exist only as batches on the training device, so resizing and normalising are done there, with torch.
A processor whose result this does not reproduce is refused when it is loaded.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

_INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
# On a scale of 255 levels; PIL rounds to whole ones after each of its two passes
_LARGEST_MEAN_DIFFERENCE = 1.0


class TeacherInput:
    """Normalised images of the student `(B, C, H, W)` to those of the teacher `(B, C, H', W')`."""

    def __init__(self, students: BaseImageProcessor, teachers: BaseImageProcessor):
        """Both processors.

        Raises:
            ValueError: if the teacher's does more to an image than is reproduced here.
        """
        self._from = _scale_and_shift(students)
        self._to = _scale_and_shift(teachers)
        self._resize = _resizing(teachers)
        size = students.size["height"], students.size["width"]
        self._is_same = self._from == self._to and (self._resize is None or self._leaves(size))
        self._check(students, teachers, size)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        if self._is_same:
            return pixel_values
        scale, shift = (pixel_values.new_tensor(values).view(-1, 1, 1) for values in self._from)
        levels = (pixel_values - shift) / scale
        if self._resize is not None:
            levels = self._resize(levels)
        scale, shift = (pixel_values.new_tensor(values).view(-1, 1, 1) for values in self._to)
        return levels * scale + shift

    def _leaves(self, size: tuple[int, int]) -> bool:
        return tuple(self._resize(torch.zeros(1, 3, *size)).shape[-2:]) == size

    def _check(self, students: BaseImageProcessor, teachers: BaseImageProcessor, size: tuple[int, int]) -> None:
        # Noise on a coarse grid: sharp enough to tell methods of interpolation apart
        coarse = np.random.default_rng(0).integers(0, 256, (max(2, size[0] // 4), max(2, size[1] // 4), 3))
        image = Image.fromarray(coarse.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        expected = teachers(image, return_tensors="pt")["pixel_values"]
        scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in self._from)
        levels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
        found = self((levels * scale + shift).unsqueeze(0))
        if found.shape != expected.shape:
            raise ValueError(
                f"{type(teachers).__name__} makes {tuple(expected.shape[1:])} of an image of {size[0]} x {size[1]} "
                f"pixels, expected {tuple(found.shape[1:])} by its size, crop and resample"
            )
        difference = ((found - expected) / torch.tensor(self._to[0]).view(-1, 1, 1)).abs().mean().item()
        if difference > _LARGEST_MEAN_DIFFERENCE:
            raise ValueError(
                f"{type(teachers).__name__} does more to an image than to resize, crop, rescale and normalise it: "
                f"its result differs by {difference:.1f} of 255 levels"
            )


def _scale_and_shift(processor: BaseImageProcessor) -> tuple[list[float], list[float]]:
    """What a level from 0 to 255 is multiplied by and then increased by, per channel."""
    rescale = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    if not getattr(processor, "do_normalize", True):
        return [rescale] * 3, [0.0] * 3
    mean, std = processor.image_mean, processor.image_std
    return [rescale / one for one in std], [-one / other for one, other in zip(mean, std)]


def _resizing(processor: BaseImageProcessor) -> Callable[[Tensor], Tensor] | None:
    """The change of size, or None."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if getattr(processor, "do_resize", True):
        steps.append(_resize_step(processor))
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size
        steps.append(_center_crop(crop["height"], crop["width"]))
    if not steps:
        return None
    return lambda levels: steps[-1](steps[0](levels)) if len(steps) == 2 else steps[0](levels)


def _resize_step(processor: BaseImageProcessor) -> Callable[[Tensor], Tensor]:
    mode = _INTERPOLATIONS.get(int(processor.resample))
    if mode is None:
        raise ValueError(f"resample={processor.resample} of its image processor: expected {list(_INTERPOLATIONS)}")
    size = dict(processor.size)

    def resize(levels: Tensor) -> Tensor:
        height, width = levels.shape[-2:]
        if "shortest_edge" in size:
            shorter = min(height, width)
            new = tuple(int(side * size["shortest_edge"] / shorter) for side in (height, width))
        else:
            new = size["height"], size["width"]
        if new == (height, width):
            return levels
        antialias = mode != "nearest-exact"
        # Columns first, and clamped between the two passes, as PIL does
        for size_of_pass in ((height, new[1]), new):
            levels = nn.functional.interpolate(levels, size_of_pass, mode=mode, antialias=antialias).clamp(0, 255)
        return levels

    return resize


def _center_crop(height: int, width: int) -> Callable[[Tensor], Tensor]:
    def crop(levels: Tensor) -> Tensor:
        top, left = (levels.shape[-2] - height) // 2, (levels.shape[-1] - width) // 2
        return levels[..., top : top + height, left : left + width]

    return crop
