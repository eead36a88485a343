"""Train Famba-V on images with labels.

    accelerate launch training/train.py --config training/configs/quickstart.yaml

Leaves in `--output_dir` a folder that `from_pretrained` and `pipeline` load, with its code, its measured results and
a model card. A stopped run resumes with `--resume_from_checkpoint latest`.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from fambav_training.cli import one_line_errors, parse_arguments
from fambav_training.data.labeled_images import LabeledImages, load_labeled_images
from fambav_training.data.pixels import CachedImages, DecodedImages, StreamedImages
from fambav_training.data.stream_loader import StreamLoader
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.processor import has_bf16_arithmetic
from fambav_training.machine.provenance import environment
from fambav_training.release.hub import LOGS, prepare_repository, publish_folder
from fambav_training.release.model_card import PLOT_FILE
from fambav_training.release.run_plot import plot_run
from fambav_training.release.saving import check_output_folder, release_files, save_release
from fambav_training.run.arguments import TrainingArguments, binding_arguments
from fambav_training.run.checkpointing import find_checkpoint
from fambav_training.run.distillation import Teacher, load_teacher
from fambav_training.run.interruption import Interrupted, Interruption
from fambav_training.run.log import read_log
from fambav_training.run.trainer import Trainer
from fambav_training.teacher.views import ImagesWithRows, TeacherViews
from modeling_fambav import FambaVConfig, FambaVForImageClassification, selective_scan_backend

logger = logging.get_logger(__name__)

# The average of the weights is a copy of the model, and the release is saved by one process.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Images of a stream among which the next one is drawn
_SHUFFLE_BUFFER = 10_000


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among the processes of this machine: `accelerate launch` gives each of them one thread."""
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(torch.get_num_threads(), cores // local_processes))


def warn_of_slow_precision(accelerator: Accelerator) -> None:
    """bfloat16 saves memory everywhere, and time only on a processor that multiplies it."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and has_bf16_arithmetic() is False:
        logger.warning(
            "--mixed_precision bf16: this processor has no bfloat16 arithmetic, a step takes longer than in float32; "
            "--mixed_precision no is faster"
        )


def create_model(
    args: TrainingArguments, overrides: dict[str, Any], label_names: list[str]
) -> tuple[FambaVForImageClassification, BaseImageProcessor]:
    """The model and its image processor, new or from a checkpoint, with the labels of the data.

    Raises:
        ValueError: if the checkpoint is of another model, or its weights do not fit the fields in `overrides`.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    checkpoint = args.model_name_or_path
    if checkpoint is None:
        config = FambaVConfig(**labels, **overrides)
        height, width = config.image_height_width
        processor = ViTImageProcessorPil(size={"height": height, "width": width}, do_convert_rgb=True)
        return FambaVForImageClassification(config), processor

    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type != FambaVConfig.model_type:
        raise ValueError(f"--model_name_or_path {checkpoint}: expected a fambav model, this is {config.model_type!r}")
    model, report = FambaVForImageClassification.from_pretrained(
        checkpoint,
        # Whatever the folder's: in half precision the steps of the optimizer and of the average are rounded away
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **labels,
        **overrides,
    )
    # A new classifier is meant to be; anything else would be silently random.
    not_loaded = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    not_loaded = [name for name in not_loaded if not name.startswith("classifier.")]
    if not_loaded or report["unexpected_keys"]:
        changed = {name: value for name, value in overrides.items() if getattr(config, name) != value}
        raise ValueError(
            f"--model_name_or_path {checkpoint}: its weights do not fit {changed}, among them "
            f"{sorted([*not_loaded, *report['unexpected_keys']])[0]}"
        )
    return model, AutoImageProcessor.from_pretrained(checkpoint)


def create_teacher(
    args: TrainingArguments, processor: BaseImageProcessor, label_names: list[str], device: torch.device
) -> Teacher | TeacherViews | None:
    """What a model learns from beside the labels, on `device`; None without distillation.

    Raises:
        ValueError: if the teacher does not fit the images and classes, or cannot be loaded.
    """
    if args.distillation_weight == 0:
        return None
    if args.teacher_views is not None:
        return TeacherViews(Path(args.teacher_views), label_names)
    flag = "model_name_or_path" if args.teacher_name_or_path is None else "teacher_name_or_path"
    trust_remote_code = args.teacher_trust_remote_code
    return load_teacher(f"--{flag}", getattr(args, flag), processor, label_names, device, trust_remote_code)


def create_loaders(
    args: TrainingArguments,
    images: LabeledImages,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    views: TeacherViews | None = None,
) -> tuple[DataLoader | StreamLoader, DataLoader]:
    """Loaders of uint8 pixels and labels, for training and for scoring; the former with rows of `views`, if given."""
    if args.streaming:
        return _stream(args, images, processor, accelerator)

    def loader(dataset, max_samples, batch_size, is_training):
        if max_samples is not None:
            # Shuffled, because datasets are often sorted by class
            dataset = dataset.shuffle(seed=args.seed).select(range(min(max_samples, len(dataset))))
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
            pin_memory=not is_cached and accelerator.device.type == "cuda",
        )

    train = loader(images.train, args.max_train_samples, args.per_device_train_batch_size, True)
    validation = loader(images.validation, args.max_eval_samples, args.per_device_eval_batch_size, False)
    return train, validation


def _whole_batch(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The datasets give whole batches, so there is nothing to collate."""
    return batch


def _stream(
    args: TrainingArguments, images: LabeledImages, processor: BaseImageProcessor, accelerator: Accelerator
) -> tuple[StreamLoader, DataLoader]:
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


def check_channels(config: FambaVConfig) -> None:
    """Raise a `ValueError` if the model does not read RGB, which all images are converted to."""
    if config.num_channels != 3:
        raise ValueError(f"--num_channels {config.num_channels}: expected 3, images are converted to RGB")


def check_trackers(args: TrainingArguments) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ValueError: if there is none, or not the one that is asked for.
    """
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if args.with_tracking and (not available or args.report_to not in ("all", *available)):
        raise ValueError(
            f"--report_to {args.report_to}: not installed; installed are {available}, try `pip install tensorboard`"
        )


def check_teacher(args: TrainingArguments) -> None:
    """Refuse distillation from no teacher, or from one that the run would replace.

    Raises:
        ValueError: if it is so.
    """
    if args.distillation_weight == 0:
        return
    teacher = args.teacher_views or args.teacher_name_or_path or args.model_name_or_path
    if teacher is None:
        raise ValueError(
            f"--distillation_weight {args.distillation_weight}: expected --model_name_or_path, which is the teacher "
            "then, or --teacher_name_or_path, or --teacher_views"
        )
    if Path(teacher).resolve() == args.output_dir.resolve():
        raise ValueError(f"--output_dir {args.output_dir}: expected another folder than the teacher's")


def run(args: TrainingArguments, overrides: dict[str, Any]) -> dict[str, Any]:
    """Train, score, save and publish. Returns what is written to `all_results.json`.

    Raises:
        ValueError: if an argument, the data, the checkpoint, the Hub or the model's fields do not fit, before any time
            is spent; or if the loss stops being finite.
        Interrupted: if it was asked to stop, after a checkpoint was saved.
    """
    check_output_folder(args.output_dir, is_resumed=args.resume_from_checkpoint is not None)
    check_trackers(args)
    check_teacher(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.cpu,
        # The order of the images is a function of seed and epoch
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=args.report_to if args.with_tracking else None,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / LOGS),
    )
    use_all_cores(accelerator)
    warn_of_slow_precision(accelerator)
    set_seed(args.seed)
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(f"{accelerator.distributed_type.value}: expected a setting that keeps the model whole")
    binding = {**binding_arguments(args, overrides), "mixed_precision": accelerator.mixed_precision}
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        wanted = args.resume_from_checkpoint, args.output_dir, binding, accelerator.num_processes
        checkpoint = find_checkpoint(*wanted)
    if args.model_name_or_path is None:
        check_channels(FambaVConfig(**overrides))
    repository = None
    if args.push_to_hub and accelerator.is_main_process:
        repository = prepare_repository(args.hub_model_id or args.output_dir.name, args.hub_private_repo)
    images = load_labeled_images(
        args.dataset_name,
        args.image_column_name,
        args.label_column_name,
        args.train_split,
        args.validation_split,
        args.seed,
        args.streaming,
    )
    model, processor = create_model(args, overrides, images.label_names)
    check_channels(model.config)
    teacher = create_teacher(args, processor, images.label_names, accelerator.device)
    views = teacher if isinstance(teacher, TeacherViews) else None
    loaders = create_loaders(args, images, processor, accelerator, views)
    trainer = Trainer(args, binding, accelerator, model, processor, *loaders, teacher)

    trainer.compile_kernels()
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        accelerator.init_trackers("fambav", config={name: str(value) for name, value in binding.items()})
    with Interruption() as interruption:
        trainer.train(interruption)
        release_dtype = getattr(torch, args.release_dtype)
        trainer.round_weights(release_dtype)
        # Once, after the last epoch: picking the best of many epochs would be choosing on the split that is reported.
        scores = trainer.evaluate()
        results = describe_run(args, overrides, accelerator, trainer, loaders, teacher, scores, repository)
        if accelerator.is_main_process:
            weights = trainer.weight_average.module if args.release_weights == "average" else trainer.model
            with release_files(args.output_dir) as folder:
                save_release(folder, accelerator.unwrap_model(weights), processor, results, release_dtype)
                plot_run(read_log(args.output_dir), model.config.sequence_lengths, folder / PLOT_FILE)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        # Last, because the other processes would not wait for a long upload
        results["hub_url"] = publish_folder(args.output_dir, repository)
    return results


def describe_run(
    args: TrainingArguments,
    overrides: dict[str, Any],
    accelerator: Accelerator,
    trainer: Trainer,
    loaders: tuple[DataLoader | StreamLoader, DataLoader],
    teacher: Teacher | TeacherViews | None,
    scores: dict[str, float],
    repository: str | None,
) -> dict[str, Any]:
    """What `all_results.json` says of a finished run: scores, costs, and all that made them."""
    model = accelerator.unwrap_model(trainer.model)
    position = trainer.position
    return {
        **scores,
        "train_loss": trainer.last_loss,
        "train_seconds": position.train_seconds,
        "processor_seconds": position.processor_seconds,
        "images_per_second": position.images / position.train_seconds,
        "peak_memory_bytes": position.peak_memory_bytes,
        "start_memory_bytes": position.start_memory_bytes,
        "sequence_lengths": model.config.sequence_lengths,
        "num_parameters": model.num_parameters(),
        "steps": position.step,
        "epochs": trainer.num_epochs,
        "nonfinite_steps": position.nonfinite_steps,
        "seed": args.seed,
        "scan_backend": selective_scan_backend(next(model.parameters())),
        "dataset": args.dataset_name,
        "train_images": _length(loaders[0]),
        "validation_images": _length(loaders[1]),
        "release_weights": args.release_weights,
        "hub_model_id": repository,
        "teacher": _describe_teacher(teacher),
        "arguments": {**dataclasses.asdict(args), "output_dir": str(args.output_dir), **overrides},
        **environment(accelerator),
    }


def _describe_teacher(teacher: Teacher | TeacherViews | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {name: getattr(teacher, name) for name in ("name", "pretrained_on", "views", "is_unfused")}


def _length(loader: DataLoader) -> int | None:
    """Images of a loader; unknown for a stream."""
    return len(loader.dataset) if hasattr(loader.dataset, "__len__") else None


def main() -> None:
    keep_freed_memory()
    try:
        with one_line_errors():
            args, overrides = parse_arguments(TrainingArguments, __doc__.splitlines()[0])
            results = run(args, overrides)
    except Interrupted as interrupted:
        # Not through sys.exit(text), whose exit code is always 1
        sys.stderr.write(f"{interrupted}\n")
        sys.exit(interrupted.exit_code)
    if not PartialState().is_main_process:
        return
    print(
        f"{args.output_dir}: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % "
        f"(averaged weights {results['ema_top1']:.2f} %, {results['ema_top5']:.2f} %), "
        f"{results['train_seconds']:.1f} s of training, {results['images_per_second']:.0f} images/s"
    )
    if "hub_url" in results:
        print(f"published: {results['hub_url']}")


if __name__ == "__main__":
    main()
