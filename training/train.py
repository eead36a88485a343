"""Train Famba-V on images with labels.

    accelerate launch training/train.py --config training/configs/quickstart.yaml

Leaves in `--output_dir` a folder that `from_pretrained` and `pipeline` load, with its code, its measured results and
a model card. A stopped run resumes with `--resume_from_checkpoint latest`.
"""

import dataclasses
import sys
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader
from transformers.utils import logging

from fambav_training.cli import one_line_errors, parse_arguments
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.data.stream_loader import StreamLoader
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.provenance import environment
from fambav_training.release.hub import prepare_repository, publish_folder
from fambav_training.release.model_card import PLOT_FILE
from fambav_training.release.run_plot import plot_run
from fambav_training.release.saving import check_output_folder, release_files, save_release
from fambav_training.run.arguments import TrainingArguments, recipe_of
from fambav_training.run.checkpointing import find_checkpoint
from fambav_training.run.distillation import Teacher
from fambav_training.run.interruption import Interrupted, Interruption
from fambav_training.run.loaders import create_loaders
from fambav_training.run.log import read_log
from fambav_training.run.setup import (
    check_channels,
    check_cuda_graphs,
    check_teacher,
    check_trackers,
    create_accelerator,
    create_model,
    create_teacher,
    start_trackers,
)
from fambav_training.run.trainer import Trainer
from fambav_training.teacher.views import TeacherViews
from modeling_fambav import FambaVConfig, selective_scan_backend

logger = logging.get_logger(__name__)


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
    accelerator = create_accelerator(args)
    check_cuda_graphs(args, accelerator)
    recipe = {**recipe_of(args, overrides), "mixed_precision": accelerator.mixed_precision}
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        wanted = args.resume_from_checkpoint, args.output_dir, recipe, accelerator.num_processes
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
    trainer = Trainer(args, recipe, accelerator, model, processor, *loaders, teacher)

    trainer.compile_kernels()
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if args.cuda_graphs:
        trainer.record_passes()
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if args.with_tracking:
        start_trackers(accelerator, args, recipe)
    with Interruption() as interruption:
        trainer.train(interruption)
        trainer.round_weights(getattr(torch, args.release_dtype))
        # Once, after the last epoch: picking the best of many epochs would be choosing on the split that is reported.
        scores = trainer.evaluate()
        results = describe_run(args, overrides, accelerator, trainer, loaders, teacher, scores, repository)
        if accelerator.is_main_process:
            release(args, trainer, results)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        # Last, because the other processes would not wait for a long upload
        results["hub_url"] = publish_folder(args.output_dir, repository)
    return results


def release(args: TrainingArguments, trainer: Trainer, results: dict[str, Any]) -> None:
    """Put the model, its card and the plot of the run into the output folder, all of them or none."""
    weights = trainer.weight_average.module if args.release_weights == "average" else trainer.model
    model = trainer.accelerator.unwrap_model(weights)
    with release_files(args.output_dir) as folder:
        save_release(folder, model, trainer.processor, results, getattr(torch, args.release_dtype))
        plot_run(read_log(args.output_dir), model.config.sequence_lengths, folder / PLOT_FILE)


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
