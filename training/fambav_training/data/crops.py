"""Views of images: a crop of the padded image, mirrored or not, that can be written down and taken again."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor


class Crops(NamedTuple):
    """One view for each of B images; the arrays may have more dimensions, for several views of an image.

    Attributes:
        top, left (`Tensor` of shape `(B,)`): uint8, where the crop begins in the padded image, 0 to 2 * padding.
        flip (`Tensor` of shape `(B,)`): bool, whether the crop is mirrored.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def draw_crops(*shape: int, padding: int, flip_prob: float, generator: torch.Generator | None = None) -> Crops:
    """Random views, of torch's generator of the CPU or another one."""
    top, left = torch.randint(2 * padding + 1, (2, *shape), generator=generator, dtype=torch.uint8)
    return Crops(top, left, torch.rand(shape, generator=generator) < flip_prob)


def take_crops(pixels: Tensor, crops: Crops, padding: int, fill: Tensor) -> Tensor:
    """Views of uint8 images `(B, C, H, W)`: same shape, padded with the colour `fill` `(C,)`."""
    height, width = pixels.shape[-2:]
    padded = fill.to(pixels).view(-1, 1, 1).expand(*pixels.shape[:2], height + 2 * padding, width + 2 * padding)
    padded = padded.clone()
    padded[..., padding : padding + height, padding : padding + width] = pixels
    views = torch.empty_like(pixels)
    for index, (top, left, flip) in enumerate(zip(*(values.tolist() for values in crops))):
        view = padded[index, :, top : top + height, left : left + width]
        views[index] = view.flip(-1) if flip else view
    return views


def mean_color(processor: BaseImageProcessor) -> Tensor:
    """The colour that becomes zero when an image is normalised, `(C,)` uint8."""
    mean = torch.tensor(processor.image_mean) / processor.rescale_factor
    return mean.round().clamp(0, 255).to(torch.uint8)
