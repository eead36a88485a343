"""Everything that only a GPU can show, in steps of a few minutes, the most valuable one first.

    export PYTHONPATH=.    # the root of the repository, unless the package is installed
    python training/measure_on_gpu.py --prepare images.safetensors --dataset_name path/to/cifar100   # anywhere
    python training/measure_on_gpu.py --images images.safetensors --minutes 7                        # on the GPU

The second needs torch, triton, transformers >= 5.18 and accelerate, and no network. Its steps have a JSON file each:

    kernel_accuracy   every operator on every backend against float64: values and gradients, data types, state sizes
    kernel_speed      the scan and the mixer, Triton beside mamba-ssm and plain torch
    model_speed       no fusion, all strategies and DeiT at 224 px, batch 128: forward, training step, memory
    time_to_accuracy  Vim-Ti on images of 32 px, with upper fusion and without: accuracy over seconds of training
    compiled_speed    what torch.compile makes of no fusion and upper; compiling takes minutes

A file is replaced as a whole with every cell of it. When the time is up, or after a signal or a crash, run the same
command again to continue: what failed or was being measured then comes after everything that was never tried.
`--rehearse` does all of it in tiny sizes on the CPU.
"""

import time

STARTED = time.monotonic()  # before torch is imported, which can take most of a minute

import argparse
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fambav_training.cli import one_line_errors
from fambav_training.gpu import images_file, kernel_accuracy, kernel_speed, model_speed, time_to_accuracy
from fambav_training.gpu.plan import Plan, full_plan, rehearsal
from fambav_training.gpu.steps import Cell, DeviceLostError, Step, read_report, run
from fambav_training.machine.provenance import environment
from fambav_training.processes import exit_on_signal

STEPS = ("kernel_accuracy", "kernel_speed", "model_speed", "time_to_accuracy", "compiled_speed")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the images for another machine, and stop")
    parser.add_argument(
        "--dataset_name", default="uoft-cs/cifar100", help="that they are from: Hub id or local folder"
    )
    parser.add_argument("--image_column_name", help="column with the images; found by its type if not given")
    parser.add_argument("--label_column_name", default="fine_label", help="column with the labels")
    parser.add_argument("--test_split", default="test", help="split of the images that are scored")
    parser.add_argument("--images", type=Path, metavar="FILE", help="file of --prepare, for time_to_accuracy")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=7, help="start no cell later than that")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="folder of all results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: expected a number above 0")
    if args.prepare is None and "time_to_accuracy" in args.steps and args.images is None:
        parser.error("--images: expected the file that --prepare has written, or --steps without time_to_accuracy")
    return args


def cells_of(step: str, plan: Plan) -> Iterable[Cell]:
    """The cells of one of `STEPS` that needs no images."""
    if step in ("model_speed", "compiled_speed"):
        return model_speed.cells(plan, plan.suite if step == "model_speed" else plan.compiled)
    return {"kernel_accuracy": kernel_accuracy, "kernel_speed": kernel_speed}[step].cells(plan)


def main(argv: list[str] | None = None, started: float | None = None) -> None:
    """Do what the flags say. `started`: when the time began to count, by `time.monotonic()`; now if None."""
    started = time.monotonic() if started is None else started
    args = parse(argv)
    with one_line_errors():
        if args.prepare is None:
            measure(args, deadline=started + 60 * args.minutes)
            return
        columns = args.image_column_name, args.label_column_name
        images = images_file.prepare(args.dataset_name, args.prepare, *columns, args.test_split)
        print(f"{args.prepare}: {len(images.train_labels)} and {len(images.test_labels)} images, {images.origin}")


def measure(args: argparse.Namespace, deadline: float) -> None:
    plan = rehearsal() if args.rehearse else full_plan()
    if plan.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --rehearse does the same in tiny sizes on the CPU")
    images = None if args.images is None else images_file.read(args.images)
    exit_on_signal(signal.SIGTERM, signal.SIGHUP)  # of a job manager, of a terminal that closes
    conditions, git_commit = conditions_of(plan)
    steps = []
    for name in args.steps:
        path = args.output_dir / f"{name}.json"
        if name == "time_to_accuracy":
            assert images is not None  # see `parse`
            if len(images.train_labels) < plan.batch_size:
                raise ValueError(f"{args.images}: expected at least {plan.batch_size} training images, a batch")
            of_training = {**conditions, "images": images.origin, "images_sha256": images.digest}
            report = read_report(path, of_training)
            folder = args.output_dir / "checkpoints"
            cells = time_to_accuracy.cells(plan, images, folder, of_training, report["cells"])
        else:
            report, cells = read_report(path, conditions), cells_of(name, plan)
        steps.append(Step(path, cells, report, git_commit))
    try:
        is_done = run(steps, lambda: time.monotonic() > deadline, device_check(plan))
    except DeviceLostError as error:
        sys.exit(f"error: {error}\nThe GPU no longer answers; run the same command again to go on with the others")
    problems = []
    for step in steps:
        finished = len(step.cells) - len(step.untried()) - len(step.failed())
        print(f"{step.path.stem}: {finished} of {len(step.cells)} cells in {step.path}", *step.problems(), sep="\n  ")
        problems += step.problems()
    if not is_done:
        sys.exit("time is up; run the same command again to continue")
    if problems:
        sys.exit(f"error: {len(problems)} {'cell' if len(problems) == 1 else 'cells'} failed")


def conditions_of(plan: Plan) -> tuple[dict[str, Any], str | None]:
    """Device, versions and the like, which all cells must share, and the commit, which they need not."""
    conditions = environment(Accelerator(cpu=plan.device == "cpu"))
    git_commit = conditions.pop("git_commit")
    if plan.device == "cuda":
        del conditions["num_threads"]  # of the CPU: another number of cores does not change what a GPU does
    return conditions, git_commit


def device_check(plan: Plan) -> Callable[[], None]:
    """A function that raises if nothing can be computed any more, as after an illegal memory access on a GPU."""
    return torch.cuda.synchronize if plan.device == "cuda" else lambda: None


if __name__ == "__main__":
    main(started=STARTED)
