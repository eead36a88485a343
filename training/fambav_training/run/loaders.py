"""Loaders of the images of a run: kept in memory, decoded by workers, or streamed."""

import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BaseImageProcessor

from fambav_training.data.labeled_images import LabeledImages, random_subset
from fambav_training.data.pixels import CachedImages, DecodedImages, StreamedImages
from fambav_training.data.stream_loader import StreamLoader
from fambav_training.run.arguments import TrainingArguments
from fambav_training.teacher.views import ImagesWithRows, TeacherViews

# Images of a stream among which the next one is drawn
_SHUFFLE_BUFFER = 10_000


def create_loaders(
    args: TrainingArguments,
    images: LabeledImages,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    views: TeacherViews | None = None,
) -> tuple[DataLoader | StreamLoader, DataLoader]:
    """Loaders of uint8 pixels and labels, for training and for scoring; the former with rows of `views`, if given."""
    if args.streaming:
        return stream_loaders(args, images, processor, accelerator)

    def loader(dataset, max_samples, batch_size, is_training):
        dataset = random_subset(dataset, max_samples, args.seed)
        source = dataset, images.image_column, images.label_column, processor, args.max_corrupt_images
        pixel_bytes = len(dataset) * 3 * processor.size["height"] * processor.size["width"]
        is_cached = pixel_bytes <= args.max_cached_mib * 2**20
        workers = 0 if is_cached else args.dataloader_num_workers
        tensors = CachedImages(*source) if is_cached else DecodedImages(*source)
        return DataLoader(
            ImagesWithRows(tensors, views) if is_training and views is not None else tensors,
            batch_size,
            shuffle=is_training,
            drop_last=is_training,
            collate_fn=_whole_batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=accelerator.device.type == "cuda",
        )

    train = loader(images.train, args.max_train_samples, args.per_device_train_batch_size, True)
    validation = loader(images.validation, args.max_eval_samples, args.per_device_eval_batch_size, False)
    return train, validation


def _whole_batch(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The datasets give whole batches, so there is nothing to collate."""
    return batch


def stream_loaders(
    args: TrainingArguments, images: LabeledImages, processor: BaseImageProcessor, accelerator: Accelerator
) -> tuple[StreamLoader, DataLoader]:
    """As `create_loaders`, of images that are read as they come; every process reads its share."""
    train, validation = images.train, images.validation
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    if args.max_eval_samples is not None:
        validation = validation.take(args.max_eval_samples)
    train = train.shuffle(seed=args.seed, buffer_size=_SHUFFLE_BUFFER)
    train = split_dataset_by_node(train, rank=accelerator.process_index, world_size=accelerator.num_processes)
    columns = images.image_column, images.label_column, processor, args.max_corrupt_images
    train_loader = DataLoader(
        StreamedImages(train, *columns),
        args.per_device_train_batch_size,
        num_workers=min(args.dataloader_num_workers, train.num_shards),
    )
    return StreamLoader(train_loader, accelerator), DataLoader(
        StreamedImages(validation, *columns), args.per_device_eval_batch_size
    )
