"""Images as uint8 tensors at the size of the model: kept in memory, decoded by workers, or read from a stream.

Decoding and resizing are done by the image processor that is saved with the model, so that `pipeline` later sees what
training saw. Rescaling and normalising wait until the batch is on its device (`normalize`).
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from fambav_training.machine.transfer import to_device

logger = logging.get_logger(__name__)


_NONE = "none of the images can be read"


class CorruptImageError(ValueError):
    """More images than allowed cannot be read."""


class _Reader:
    """Reads rows of a dataset, and counts those whose image cannot be read; however often a row is read, once.

    In a loader with workers, each of them counts its own.
    """

    def __init__(self, image_column: str, label_column: str, processor: BaseImageProcessor, max_corrupt: int):
        self._image_column, self._label_column = image_column, label_column
        self._processor, self._max_corrupt = processor, max_corrupt
        self._corrupt: set[int] = set()

    def read(self, row: dict[str, Any], index: int) -> tuple[Tensor, int] | None:
        """Pixels and label, or None if the image is corrupt.

        Raises:
            CorruptImageError: at the first one that is too many.
        """
        try:
            if row[self._image_column] is None:
                raise ValueError("there is none")
            image = ImageFeature().decode_example(row[self._image_column])
            return to_pixels(image, self._processor), row[self._label_column]
        except Exception as error:  # decoders fail in every kind on damaged files
            if index in self._corrupt:
                return None
            self._corrupt.add(index)
            path = (row[self._image_column] or {}).get("path")
            message = f"image {index}{f' ({path})' if path else ''} cannot be read: {error}"
            if len(self._corrupt) > self._max_corrupt:
                raise CorruptImageError(f"{message}; --max_corrupt_images allows {self._max_corrupt}") from error
            logger.warning(f"skipped: {message}")
            return None


class CachedImages(torch.utils.data.Dataset):
    """Images that are decoded once. An item is `(pixels (C, H, W) uint8, label)`; corrupt ones are left out."""

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        processor: BaseImageProcessor,
        max_corrupt: int = 0,
    ):
        reader = _Reader(image_column, label_column, processor, max_corrupt)
        rows = _undecoded(dataset, image_column)
        size = processor.size["height"], processor.size["width"]
        # One piece from the start: a list that is stacked would take twice the memory
        self.pixels = torch.empty(len(rows), 3, *size, dtype=torch.uint8)
        labels = []
        for index, row in enumerate(rows):
            if (item := reader.read(row, index)) is not None:
                self.pixels[len(labels)] = item[0]
                labels.append(item[1])
        if not labels:
            raise CorruptImageError(_NONE)
        self.pixels, self.labels = self.pixels[: len(labels)], torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        return self.pixels[indices], self.labels[indices]


class DecodedImages(torch.utils.data.Dataset):
    """Images that are decoded whenever they are asked for. The next one that can be read stands for a corrupt one."""

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        processor: BaseImageProcessor,
        max_corrupt: int = 0,
    ):
        self._rows = _undecoded(dataset, image_column)
        self._reader = _Reader(image_column, label_column, processor, max_corrupt)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        for readable in itertools.chain(range(index, len(self)), range(index)):
            if (item := self._reader.read(self._rows[readable], readable)) is not None:
                return item[0], torch.tensor(item[1])
        raise CorruptImageError(_NONE)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        return torch.utils.data.default_collate([self[index] for index in indices])


class StreamedImages(torch.utils.data.IterableDataset):
    """Images in the order in which they are read; corrupt ones are left out."""

    def __init__(
        self,
        dataset: IterableDataset,
        image_column: str,
        label_column: str,
        processor: BaseImageProcessor,
        max_corrupt: int = 0,
    ):
        self._rows = _undecoded(dataset, image_column)
        self._new_reader = functools.partial(_Reader, image_column, label_column, processor, max_corrupt)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, if the stream is shuffled."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        reader = self._new_reader()  # a shuffled stream has other numbers for its images in the next pass
        for index, row in enumerate(self._rows):
            if (item := reader.read(row, index)) is not None:
                yield item[0], torch.tensor(item[1])


def _undecoded(dataset: Dataset | IterableDataset, image_column: str) -> Dataset | IterableDataset:
    """Rows with the bytes of their images, so that one that cannot be decoded is an error of its own."""
    return dataset.cast_column(image_column, ImageFeature(decode=False))


def to_pixels(image: Image.Image, processor: BaseImageProcessor) -> Tensor:
    """Convert to RGB and resize as the processor does: uint8 (C, H, W)."""
    batch = processor(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
    return batch["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)


def normalize(pixels: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Rescale and normalise a batch of uint8 pixels as the processor does: float32, same shape."""
    statistics = torch.tensor([processor.image_mean, processor.image_std], dtype=torch.float32, device="cpu")
    mean, std = to_device(statistics, pixels.device).view(2, -1, 1, 1)
    return (pixels * processor.rescale_factor - mean) / std
