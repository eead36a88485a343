"""Store what a teacher says of K views of every training image, for `train.py --teacher_views`.

    python training/store_teacher_views.py outputs/teacher outputs/views --dataset_name uoft-cs/cifar100 --views 4

A view is a crop of the padded image, mirrored or not. The teacher sees it as its own image processor makes it. Run
a stopped command again to resume it.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.cli import one_line_errors
from fambav_training.data.crops import draw_crops, mean_color, take_crops
from fambav_training.data.labeled_images import load_labeled_images, random_subset
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.processor import warn_of_slow_precision
from fambav_training.run.distillation import Teacher, load_teacher
from fambav_training.sources import loading
from fambav_training.teacher.views import Manifest, begin, digest_pixels, write_file


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of any image classifier")
    parser.add_argument("output_dir", metavar="OUT", type=Path, help="folder for the views")
    parser.add_argument("--dataset_name", required=True, help="as in train.py")
    parser.add_argument("--image_column_name", help="as in train.py")
    parser.add_argument("--label_column_name", help="as in train.py")
    parser.add_argument("--train_split", default="train", help="all of its images are stored")
    parser.add_argument(
        "--max_train_samples", type=int, help="store only this many, those that train.py takes with the same --seed"
    )
    parser.add_argument("--views", type=int, default=4, help="views of every image")
    parser.add_argument(
        "--image_size", type=int, nargs="+", default=[32], help="of the student: side, or height width"
    )
    parser.add_argument("--model_name_or_path", help="use the image processor of this checkpoint, not --image_size")
    parser.add_argument("--random_crop_padding", type=int, help="pixels; an eighth of the side if not given")
    parser.add_argument("--horizontal_flip_prob", type=float, default=0.5, help="probability of a mirrored view")
    parser.add_argument("--batch_size", type=int, default=128, help="images that the teacher sees at once")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="no",
        help="bf16: the teacher's products in bfloat16, much faster where the processor or GPU has it",
    )
    parser.add_argument("--images_per_file", type=int, default=2000, help="what a stopped command loses at most")
    parser.add_argument(
        "--teacher_trust_remote_code", action="store_true", help="run code that comes with the teacher"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the views, and of the choice of --max_train_samples")
    args = parser.parse_args(argv)
    for name in ("views", "batch_size", "images_per_file"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if not 0 <= args.horizontal_flip_prob <= 1:
        parser.error(f"--horizontal_flip_prob {args.horizontal_flip_prob}: expected a number in [0, 1]")
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        parser.error(f"--image_size {args.image_size}: expected one or two integers >= 1")
    height, width = args.image_size[0], args.image_size[-1]
    padding = min(height, width) // 8 if args.random_crop_padding is None else args.random_crop_padding
    if not 0 <= padding <= 127:
        parser.error(f"--random_crop_padding {padding}: expected 0 to 127")
    args.random_crop_padding = padding
    return args


def store(args: argparse.Namespace) -> Manifest:
    """Compute and write what is not there yet.

    Raises:
        ValueError: if teacher, data or folder do not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warn_of_slow_precision(device, args.mixed_precision)
    columns = args.image_column_name, args.label_column_name
    split = args.train_split
    images = load_labeled_images(args.dataset_name, *columns, split, split)
    if args.model_name_or_path is not None:
        with loading(args.model_name_or_path, "--model_name_or_path"):
            processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    else:
        size = {"height": args.image_size[0], "width": args.image_size[-1]}
        processor = ViTImageProcessorPil(size=size, do_convert_rgb=True)
    trust = args.teacher_trust_remote_code
    teacher = load_teacher("TEACHER", args.teacher, processor, images.label_names, device, trust)
    dataset = random_subset(images.train, args.max_train_samples, args.seed)  # as in train.py
    pixels = CachedImages(dataset, images.image_column, images.label_column, processor).pixels
    manifest = Manifest(
        teacher=args.teacher,
        teacher_sha256=teacher.fingerprint(),
        teacher_pretrained_on=teacher.pretrained_on,
        dataset=args.dataset_name,
        split=args.train_split,
        image_height=pixels.shape[-2],
        image_width=pixels.shape[-1],
        fill=mean_color(processor).tolist(),
        padding=args.random_crop_padding,
        horizontal_flip_prob=args.horizontal_flip_prob,
        views=args.views,
        seed=args.seed,
        mixed_precision=args.mixed_precision,
        label_names=images.label_names,
        images=len(pixels),
        images_per_file=args.images_per_file,
    )
    remaining = begin(args.output_dir, manifest)
    done = manifest.num_files - len(remaining)
    for index in tqdm(remaining, desc="views", initial=done, total=manifest.num_files, unit="file"):
        part = pixels[index * args.images_per_file : (index + 1) * args.images_per_file]
        generator = torch.Generator().manual_seed(args.seed * 2**20 + index)
        crops = draw_crops(
            len(part),
            args.views,
            padding=manifest.padding,
            flip_prob=manifest.horizontal_flip_prob,
            generator=generator,
        )
        logits = _score(teacher, part, crops, processor, manifest, args.batch_size, device)
        write_file(args.output_dir, manifest, index, digest_pixels(part), crops, logits)
    return manifest


def _score(teacher: Teacher, pixels, crops, processor, manifest: Manifest, batch_size: int, device) -> torch.Tensor:
    """Logits `(B, K, classes)` of the views of these images."""
    pixels = pixels.repeat_interleave(manifest.views, 0)
    crops = type(crops)(*(values.flatten() for values in crops))
    views = take_crops(pixels, crops, manifest.padding, torch.tensor(manifest.fill, dtype=torch.uint8))
    batches = (normalize(batch.to(device), processor) for batch in views.split(batch_size))
    with torch.autocast(device.type, torch.bfloat16, enabled=manifest.mixed_precision == "bf16"):
        logits = torch.cat([teacher(batch).float().cpu() for batch in batches])
    return logits.unflatten(0, (-1, manifest.views))


def main() -> None:
    keep_freed_memory()
    args = parse()
    with one_line_errors():
        manifest = store(args)
    print(f"{args.output_dir}: {manifest.views} views of {manifest.images} images")


if __name__ == "__main__":
    main()
