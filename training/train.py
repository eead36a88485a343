"""Train Famba-V on images with labels.

    accelerate launch training/train.py --config training/configs/quickstart.yaml

Leaves in `--output_dir` a folder that `from_pretrained` and `pipeline` load, with its code, its measured results and
a model card.
"""

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, get_scheduler
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from arguments import parse_arguments
from data import ImageTensors, LabeledImages, load_labeled_images, normalize
from memory import keep_freed_memory
from metrics import evaluate
from modeling_fambav import FambaVConfig, FambaVForImageClassification, selective_scan_backend
from modeling_fambav.selective_scan import uses_cpu_kernels
from optimization import create_optimizer, create_weight_average
from provenance import environment, peak_memory_bytes
from saving import atomic_folder, check_output_folder, save_release

# Those that need nothing but the numbers of warm-up steps and of all steps
_SCHEDULES = ["cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup"]


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """Flags of this script, beside one for every field of `FambaVConfig`."""

    dataset_name: str = _flag("digits", "Hub id, local folder that load_dataset reads, or 'digits' (built in)")
    image_column_name: str | None = _flag(None, "column with the images; found by its type if not given")
    label_column_name: str | None = _flag(None, "column with the labels; the first of type ClassLabel if not given")
    train_split: str = _flag("train", "split to train on")
    validation_split: str | None = _flag(None, "split to score; if not given, 20% of the training split is set aside")
    max_train_samples: int | None = _flag(None, "use only this many training images")
    max_eval_samples: int | None = _flag(None, "use only this many validation images")
    output_dir: Path = _flag(Path("outputs/run"), "folder for the trained model and its results")
    model_name_or_path: str | None = _flag(None, "start from this checkpoint; a new classifier if the labels differ")
    num_train_epochs: int = _flag(300, "passes over the training images")
    max_train_steps: int | None = _flag(None, "optimizer steps; overrides num_train_epochs")
    per_device_train_batch_size: int = _flag(128, "images per process and step")
    per_device_eval_batch_size: int = _flag(128, "images per process in evaluation")
    gradient_accumulation_steps: int = _flag(1, "batches per optimizer step")
    learning_rate: float = _flag(1e-3, "peak learning rate")
    weight_decay: float = _flag(0.1, "not applied to norms, biases, A_log, D, class token and positions")
    lr_scheduler_type: str = _flag("cosine", "schedule of the learning rate, a name that transformers knows")
    warmup_ratio: float = _flag(0.02, "share of the steps in which the learning rate rises linearly")
    label_smoothing: float = _flag(0.1, "share of the target spread over all classes")
    ema_decay: float = _flag(0.9999, "decay of the exponential moving average of the weights")
    seed: int = _flag(0, "seed of weights, data order and validation split")
    mixed_precision: str | None = _flag(None, "no, fp16 or bf16; accelerate's own setting if not given")
    cpu: bool = _flag(False, "train on the CPU even if there is an accelerator")

    def __post_init__(self):
        minimums = {
            "num_train_epochs": 1,
            "max_train_steps": 1,
            "max_train_samples": 1,
            "max_eval_samples": 1,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.0,
            "weight_decay": 0.0,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= minimum):
                raise ValueError(f"--{name} {value}: expected a number >= {minimum}")
        for name in ("warmup_ratio", "label_smoothing", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number in [0, 1)")
        if self.lr_scheduler_type not in _SCHEDULES:
            raise ValueError(f"--lr_scheduler_type {self.lr_scheduler_type}: expected one of {_SCHEDULES}")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ValueError(f"--mixed_precision {self.mixed_precision}: expected no, fp16 or bf16")


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among the processes of this machine: `accelerate launch` gives each of them one thread."""
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(torch.get_num_threads(), cores // local_processes))


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
        checkpoint, ignore_mismatched_sizes=True, output_loading_info=True, **labels, **overrides
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


def create_loaders(
    args: TrainingArguments, images: LabeledImages, processor: BaseImageProcessor
) -> tuple[DataLoader, DataLoader]:
    """Loaders of uint8 pixels and labels, for training and for scoring."""

    def loader(dataset, max_samples, batch_size, is_training):
        if max_samples is not None:
            # Shuffled, because datasets are often sorted by class
            dataset = dataset.shuffle(seed=args.seed).select(range(min(max_samples, len(dataset))))
        tensors = ImageTensors(dataset, images.image_column, images.label_column, processor)
        # A batch already comes whole from the dataset, so there is nothing to collate.
        return DataLoader(
            tensors, batch_size, shuffle=is_training, drop_last=is_training, collate_fn=lambda batch: batch
        )

    train = loader(images.train, args.max_train_samples, args.per_device_train_batch_size, True)
    validation = loader(images.validation, args.max_eval_samples, args.per_device_eval_batch_size, False)
    return train, validation


class Trainer:
    """Model, optimizer, schedule and weight average of one run, and the loop over them."""

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: FambaVForImageClassification,
        processor: BaseImageProcessor,
        train_loader: DataLoader,
    ):
        self.args, self.accelerator, self.processor = args, accelerator, processor
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        optimizer = create_optimizer(model, args.learning_rate, args.weight_decay)
        self.model, self.optimizer, self.train_loader = accelerator.prepare(model, optimizer, train_loader)
        if len(self.train_loader) == 0:
            raise ValueError(
                f"--per_device_train_batch_size {args.per_device_train_batch_size}: expected at most "
                f"{len(train_loader.dataset)} training images over {accelerator.num_processes} process(es)"
            )
        self.weight_average = create_weight_average(accelerator.unwrap_model(self.model), args.ema_decay)

        steps_per_epoch = math.ceil(len(self.train_loader) / args.gradient_accumulation_steps)
        self.num_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
        self.num_epochs = math.ceil(self.num_steps / steps_per_epoch)
        # Not prepared: accelerate steps a prepared schedule once per process; this one counts optimizer steps.
        self.schedule = get_scheduler(
            args.lr_scheduler_type, self.optimizer, round(args.warmup_ratio * self.num_steps), self.num_steps
        )
        self.step = 0
        self.progress = tqdm(total=self.num_steps, desc="training", disable=not accelerator.is_local_main_process)

    def compile_kernels(self) -> None:
        """Compile the CPU kernels by one small step, so that this is no part of the time and memory of training."""
        model = self.accelerator.unwrap_model(self.model)
        if not uses_cpu_kernels(next(model.parameters())):
            return
        config = model.config
        with torch.random.fork_rng():
            model.train()
            model(torch.zeros(1, config.num_channels, *config.image_height_width)).logits.sum().backward()
        self.optimizer.zero_grad()

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images, or what is left of `max_train_steps`. Returns what to log.

        Raises:
            ValueError: if the loss is not finite.
        """
        self.model.train()
        total_loss = torch.zeros((), device=self.accelerator.device)
        num_batches = 0
        for pixels, labels in self.train_loader:
            if self.step == self.num_steps:
                break
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    logits = self.model(pixel_values=normalize(pixels, self.processor)).logits
                    loss = self.loss_function(logits, labels)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total_loss += loss.detach()
            num_batches += 1
            if self.accelerator.sync_gradients:
                self.schedule.step()
                self.weight_average.update_parameters(self.accelerator.unwrap_model(self.model))
                self.step += 1
                self.progress.update()
        mean_loss = self.accelerator.reduce(total_loss, "mean").item() / num_batches
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"the loss is {mean_loss} in the epoch that ended with step {self.step}, at learning rate "
                f"{self.schedule.get_last_lr()[0]:.2g}: lower --learning_rate"
            )
        self.progress.set_postfix(loss=f"{mean_loss:.3f}")
        return {"step": self.step, "train_loss": mean_loss, "learning_rate": self.schedule.get_last_lr()[0]}


def run(args: TrainingArguments, overrides: dict[str, Any]) -> dict[str, Any]:
    """Train, score and save. Returns what is written to `all_results.json`.

    Raises:
        ValueError: if an argument, the data or the model's fields do not fit, before any time is spent; or if the
            loss stops being finite.
    """
    check_output_folder(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.cpu,
    )
    use_all_cores(accelerator)
    set_seed(args.seed)
    images = load_labeled_images(
        args.dataset_name,
        args.image_column_name,
        args.label_column_name,
        args.train_split,
        args.validation_split,
        args.seed,
    )
    model, processor = create_model(args, overrides, images.label_names)
    if model.config.num_channels != 3:
        raise ValueError(f"--num_channels {model.config.num_channels}: expected 3, images are converted to RGB")
    train_loader, validation_loader = create_loaders(args, images, processor)
    trainer = Trainer(args, accelerator, model, processor, train_loader)
    validation_loader = accelerator.prepare(validation_loader)

    trainer.compile_kernels()
    start_memory = peak_memory_bytes(accelerator.device)
    train_seconds, log = 0.0, []
    for epoch in range(1, trainer.num_epochs + 1):
        started = time.perf_counter()
        record = trainer.train_epoch()
        train_seconds += time.perf_counter() - started
        log.append({"epoch": epoch, "train_seconds": train_seconds, **record})
    peak_memory = peak_memory_bytes(accelerator.device)
    trainer.progress.close()

    # Once, after the last epoch: picking the best of many epochs would be choosing on the split that is reported.
    scores = evaluate(trainer.model, validation_loader, processor, accelerator)
    averaged = evaluate(trainer.weight_average.module, validation_loader, processor, accelerator)
    num_images = trainer.step * args.per_device_train_batch_size * args.gradient_accumulation_steps
    results = {
        **scores,
        "ema_top1": averaged["top1"],
        "ema_top5": averaged["top5"],
        "train_loss": log[-1]["train_loss"],
        "train_seconds": train_seconds,
        "images_per_second": num_images * accelerator.num_processes / train_seconds,
        "peak_memory_bytes": peak_memory,
        "start_memory_bytes": start_memory,
        "sequence_lengths": model.config.sequence_lengths,
        "num_parameters": model.num_parameters(),
        "steps": trainer.step,
        "epochs": trainer.num_epochs,
        "seed": args.seed,
        "scan_backend": selective_scan_backend(next(model.parameters())),
        "dataset": args.dataset_name,
        "train_images": len(train_loader.dataset),
        "validation_images": len(validation_loader.dataset),
        "arguments": {**dataclasses.asdict(args), "output_dir": str(args.output_dir), **overrides},
        **environment(accelerator),
    }
    if accelerator.is_main_process:
        with atomic_folder(args.output_dir) as folder:
            save_release(folder, accelerator.unwrap_model(trainer.model), processor, results)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def main() -> None:
    keep_freed_memory()
    try:
        args, overrides = parse_arguments(TrainingArguments, __doc__.splitlines()[0])
        results = run(args, overrides)
    except (ValueError, StrictDataclassError, OSError) as error:
        sys.exit(f"error: {error}")
    if not PartialState().is_main_process:
        return
    print(
        f"{args.output_dir}: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % "
        f"(averaged weights {results['ema_top1']:.2f} %, {results['ema_top5']:.2f} %), "
        f"{results['train_seconds']:.1f} s of training, {results['images_per_second']:.0f} images/s"
    )


if __name__ == "__main__":
    main()
