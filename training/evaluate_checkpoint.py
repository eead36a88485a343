"""Score a trained classifier on a dataset, with the fusion it was trained with or another.

    python training/evaluate_checkpoint.py outputs/demo/upper --dataset_name digits --fusion_strategy none

Prints top-1 and top-5 accuracy in percent, and writes them to `--output_file` with all that they depend on. Without
`--validation_split` it scores the fifth of the training split that training with the same `--seed` has set aside.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from arguments import add_model_flags, config_overrides
from data import LabeledImages, load_labeled_images
from memory import keep_freed_memory
from metrics import evaluate
from modeling_fambav import FambaVConfig, selective_scan_backend
from pixels import CachedImages, normalize
from provenance import environment

logger = logging.get_logger(__name__)


def load_classifier(name: str, fusion: dict[str, Any]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained model and its image processor, with these fusion fields instead of its own.

    Raises:
        ValueError: if the model is not one of ours, or a field has a wrong value.
        OSError: if there is no such model.
    """
    model = AutoModelForImageClassification.from_pretrained(name)
    if model.config.model_type != FambaVConfig.model_type:
        raise ValueError(f"{name}: expected a fambav model, this is {model.config.model_type!r}")
    fields = model.config.to_dict()
    if "fusion_strategy" in fusion:  # the checkpoint's layers and schedule belong to its own strategy
        fields.update(fusion_start_layer=None, fusion_end_layer=None, fusion_schedule=None)
    # A new configuration, so that fields that go together are checked together
    model.config.update(FambaVConfig(**{**fields, **fusion}).to_dict())
    return model, AutoImageProcessor.from_pretrained(name)


def label_indices(label_names: list[str], model: PreTrainedModel) -> list[int]:
    """The model's index of every class of a dataset, by name.

    Raises:
        ValueError: if the model does not know a class.
    """
    known = {str(name): int(index) for name, index in model.config.label2id.items()}
    unknown = [name for name in label_names if name not in known]
    if not unknown:
        return [known[name] for name in label_names]
    has_default_names = all(name == f"LABEL_{index}" for name, index in known.items())
    if has_default_names and len(known) == len(label_names):
        logger.warning(f"the model names none of its {len(known)} classes; they are taken in the order of the dataset")
        return list(range(len(label_names)))
    raise ValueError(f"class {unknown[0]!r} of the dataset: expected one of the model's, {sorted(known)}")


def score(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: LabeledImages,
    accelerator: Accelerator,
    batch_size: int,
    max_samples: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy in percent, images and images/s on the validation images; `seed` chooses `max_samples` of them."""
    dataset = images.validation
    if max_samples is not None:
        dataset = dataset.shuffle(seed=seed).select(range(min(max_samples, len(dataset))))
    tensors = CachedImages(dataset, images.image_column, images.label_column, processor)
    tensors.labels = torch.tensor(label_indices(images.label_names, model))[tensors.labels]
    loader = DataLoader(tensors, batch_size, collate_fn=lambda batch: batch)
    model, loader = accelerator.prepare(model, loader)
    with torch.inference_mode():  # kernels are compiled at the first call, which is no part of the speed
        model.eval()(normalize(tensors.pixels[:1].to(accelerator.device), processor))
    started = time.perf_counter()
    scores = evaluate(model, loader, processor, accelerator)
    seconds = time.perf_counter() - started
    return {**scores, "validation_images": len(tensors), "images_per_second": len(tensors) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("--dataset_name", default="digits", help="as of train.py")
    parser.add_argument("--image_column_name", help="column with the images; found by its type if not given")
    parser.add_argument("--label_column_name", help="column with the labels; found by its type if not given")
    parser.add_argument("--train_split", default="train", help="split that a fifth is scored of")
    parser.add_argument("--validation_split", help="split to score, instead of a fifth of the training split")
    parser.add_argument("--max_eval_samples", type=int, help="score only this many images")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=128, help="images per process and batch")
    parser.add_argument("--seed", type=int, default=0, help="of the fifth that is set aside")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's own if not given")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is an accelerator")
    parser.add_argument("--output_file", type=Path, default=Path("outputs/evaluation.json"), help="where to write")
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    fusion = config_overrides(args)
    keep_freed_memory()
    try:
        for name in ("max_eval_samples", "per_device_eval_batch_size"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected a number >= 1")
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        model, processor = load_classifier(args.model, fusion)
        images = load_labeled_images(
            args.dataset_name,
            args.image_column_name,
            args.label_column_name,
            args.train_split,
            args.validation_split,
            args.seed,
        )
        batch_size, max_samples = args.per_device_eval_batch_size, args.max_eval_samples
        scores = score(model, processor, images, accelerator, batch_size, max_samples, args.seed)
    except (ValueError, StrictDataclassError, OSError) as error:
        sys.exit(f"error: {error}")
    if not accelerator.is_main_process:
        return
    results = {
        "model": args.model,
        **scores,
        "sequence_lengths": model.config.sequence_lengths,
        "scan_backend": selective_scan_backend(next(model.parameters())),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        **environment(accelerator),
    }
    args.output_file.write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"{args.model}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['validation_images']} "
        f"images, {scores['images_per_second']:.0f} images/s, fusion {model.config.fusion_strategy}, tokens per layer "
        f"{' '.join(map(str, model.config.sequence_lengths))}"
    )


if __name__ == "__main__":
    main()
