"""Put a trained classifier into eight bits, and measure what that costs and saves beside float32 and bfloat16.

    python training/quantize.py model_cards/fambav-cifar100 outputs/int8 --dataset_name uoft-cs/cifar100 \
        --image_column_name img --label_column_name fine_label --validation_split test

Leaves in a new folder `onnx/model_quantized.onnx`, quantised by `--method`, the configuration, the image processor, a
model card, and `quantization.json` with what was measured of every precision. `publish.py` takes the folder. Static
scales are those of training images. torchao is measured too if it is installed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from fambav_training.cli import one_line_errors
from fambav_training.data.labeled_images import LabeledImages, load_labeled_images, random_subset
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.evaluation.scoring import label_indices, load_classifier
from fambav_training.export.onnx_file import check_packages, exported_file
from fambav_training.export.precisions import all_precisions, measure_precisions, precision_table
from fambav_training.export.quantization import METHODS
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.provenance import environment
from fambav_training.release.quantized import base_model_of, write_quantized_release


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--method", choices=METHODS, default="static", help="what the folder holds")
    parser.add_argument(
        "--base_model",
        help="OWNER/NAME on the Hub of what is quantised; MODEL's name if not given",
    )
    parser.add_argument("--dataset_name", default="digits", help="Hub id, local folder, or digits")
    parser.add_argument("--image_column_name")
    parser.add_argument("--label_column_name")
    parser.add_argument("--train_split", default="train", help="split to calibrate on")
    parser.add_argument("--validation_split", help="split to score; if not given, 20%% of the training split")
    parser.add_argument("--max_eval_samples", type=int, help="score only this many images")
    parser.add_argument("--calibration_samples", type=int, default=512, help="training images that give the scales")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0, help="chooses the images")
    return parser.parse_args()


def cached(args: argparse.Namespace, images: LabeledImages, split: str, limit: int | None, processor) -> CachedImages:
    """At most `limit` images of the `train` or `validation` split, chosen by the seed."""
    dataset = random_subset(getattr(images, split), limit, args.seed)
    return CachedImages(dataset, images.image_column, images.label_column, processor)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError if a number is out of range, or the folder exists."""
    for name in ("max_eval_samples", "calibration_samples", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected a number >= 1")
    if args.output.exists():
        raise ValueError(f"{args.output}: exists already; remove it or name another folder")


def run(args: argparse.Namespace) -> str:
    """Quantise, measure and write. Returns the table of what was measured.

    Raises:
        ValueError: if an argument, the data or the model does not fit, or a package is missing.
    """
    check_flags(args)
    check_packages()
    base_model = base_model_of(args.base_model, args.model)
    model, processor = load_classifier(args.model, {})
    model = model.eval().float()
    names = args.dataset_name, args.image_column_name, args.label_column_name
    images = load_labeled_images(*names, args.train_split, args.validation_split, args.seed)
    scored = cached(args, images, "validation", args.max_eval_samples, processor)
    scored.labels = torch.tensor(label_indices(images.label_names, model))[scored.labels]
    calibration = cached(args, images, "train", args.calibration_samples, processor)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = exported_file(model, Path(args.model), folder)
        precisions = all_precisions(model, exported, folder, normalize(calibration.pixels, processor))
        rows = measure_precisions(precisions, scored, processor, args.rounds)
        report = {
            "model": args.model,
            "method": args.method,
            "dataset": args.dataset_name,
            "split": args.validation_split or args.train_split,
            "validation_images": len(scored),
            "calibration_images": len(calibration),
            "rounds": args.rounds,
            "precisions": rows,
            **environment(Accelerator(cpu=True)),
        }
        file = folder / f"{args.method}.onnx"
        write_quantized_release(args.output, model.config, processor, file, report, base_model, precision_table(rows))
    return precision_table(rows)


def main() -> None:
    keep_freed_memory()
    args = parse_command_line()
    with one_line_errors():
        table = run(args)
    print(f"{table}\n\n{args.output}: see {args.output / 'quantization.json'}")


if __name__ == "__main__":
    main()
