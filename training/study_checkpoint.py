"""Add to a model card what the model gets wrong, and its accuracy with more and less fusion.

    python training/study_checkpoint.py outputs/run --dataset_name uoft-cs/cifar100 --validation_split test

Scores the images once per row, and writes the card and `all_results.json` of the folder anew.
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator

from fambav_training.cli import one_line_errors
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.scoring import Scorer, load_classifier
from fambav_training.evaluation.study import study
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.release.model_card import create_card
from fambav_training.release.saving import RESULTS_FILE, release_files


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder that train.py has left")
    parser.add_argument("--dataset_name", required=True, help="as in train.py")
    parser.add_argument("--image_column_name", help="as in train.py")
    parser.add_argument("--label_column_name", help="as in train.py")
    parser.add_argument("--validation_split", help="as in train.py: a fifth of the training split if not given")
    parser.add_argument("--seed", type=int, default=0, help="of that fifth")
    parser.add_argument("--max_eval_samples", type=int, help="score only this many images")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=128, help="images per batch")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's own if not given")
    return parser.parse_args(argv)


def study_checkpoint(args: argparse.Namespace) -> None:
    """Score, and write results and card.

    Raises:
        ValueError: if the folder is not one of train.py, or the images do not fit it.
        OSError: if it cannot be read or written.
    """
    path = args.model / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"MODEL {args.model}: expected {RESULTS_FILE} in it, as train.py leaves it")
    results = json.loads(path.read_text())
    model, processor = load_classifier(str(args.model), {})
    columns = args.image_column_name, args.label_column_name
    images = load_labeled_images(args.dataset_name, *columns, validation_split=args.validation_split, seed=args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    scorer = Scorer(
        model, processor, images, accelerator, args.per_device_eval_batch_size, args.max_eval_samples, args.seed
    )
    results["study"] = study(scorer)
    with release_files(args.model) as folder:
        create_card(model.config, results).save(folder / "README.md")
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


def main() -> None:
    keep_freed_memory()
    args = parse()
    with one_line_errors():
        study_checkpoint(args)
    print(f"{args.model}: README.md and {RESULTS_FILE} are written")


if __name__ == "__main__":
    main()
