"""Views of images: a crop of the padded image, mirrored or not, that can be written down and taken again."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from fambav_training.machine.transfer import to_device


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
    """Views of uint8 images `(B, C, H, W)`: same shape, padded with the colour `fill` `(C,)`.

    `crops` are on the host or where the pixels are. A processor copies one image after the other, which is one to four
    times as fast there; a GPU gathers all of them at once, and waits for nothing.
    """
    height, width = pixels.shape[-2:]
    padded = to_device(fill.to(pixels.dtype), pixels.device).view(-1, 1, 1)
    padded = padded.expand(*pixels.shape[:2], height + 2 * padding, width + 2 * padding).clone()
    padded[..., padding : padding + height, padding : padding + width] = pixels
    return (_copy_crops if pixels.device.type == "cpu" else _gather_crops)(padded, crops, height, width)


def _copy_crops(padded: Tensor, crops: Crops, height: int, width: int) -> Tensor:
    views = padded.new_empty(*padded.shape[:2], height, width)
    for index, (top, left, flip) in enumerate(zip(*(values.tolist() for values in crops))):
        view = padded[index, :, top : top + height, left : left + width]
        views[index] = view.flip(-1) if flip else view
    return views


def _gather_crops(padded: Tensor, crops: Crops, height: int, width: int) -> Tensor:
    # Of crops on the host the indices are made there, and copied once
    rows = crops.top.long()[:, None] + torch.arange(height, device=crops.top.device)
    columns = torch.arange(width, device=crops.left.device)
    columns = crops.left.long()[:, None] + torch.where(crops.flip[:, None], columns.flip(0), columns)
    rows, columns = to_device(torch.cat((rows, columns), 1), padded.device).split((height, width), 1)
    rows = rows[:, None, :, None].expand(-1, padded.shape[1], -1, padded.shape[-1])
    columns = columns[:, None, None, :].expand(-1, padded.shape[1], height, -1)
    return padded.gather(2, rows).gather(3, columns)


def mean_color(processor: BaseImageProcessor) -> Tensor:
    """The colour that becomes zero when an image is normalised, `(C,)` uint8."""
    mean = torch.tensor(processor.image_mean) / processor.rescale_factor
    return mean.round().clamp(0, 255).to(torch.uint8)
