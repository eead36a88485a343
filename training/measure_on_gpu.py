"""All that only a GPU can show, in the order of its value: what is still open in the README and the cards.

    python training/measure_on_gpu.py --dataset_name path/to/cifar100 --minutes 30

Stages, each a command of its own that can be run by hand too (`--list` prints them):

    tests          the kernels against their reference, on the GPU
    benchmark      step time and memory at 224 px, batch 128, of all strategies; Triton, mamba-ssm and DeiT
    upper, none    Vim-Ti on CIFAR-100's own 32 px, in bfloat16: accuracy over time, and two checkpoints to release
    table1         all strategies of Table 1 at this scale, a third of the epochs

When the time is up, the running stage is stopped; a training saves a checkpoint first. Run the same command again to
resume: it restarts an unfinished `tests` or `benchmark`, and leaves finished stages alone. In the output folder,
`stages.json` says what is finished, `accuracy_over_time.png` and `.json` how soon the runs passed 70 % and 76 %.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fambav_training.plots import plot_to
from fambav_training.release.saving import RESULTS_FILE
from fambav_training.run.log import FILE as METRICS_FILE
from fambav_training.run.log import read_log

TRAINING = Path(__file__).parent
_RUNS = ("upper", "none")
# Percent of top-1: what the paper reports for Vim-Ti with upper fusion and without, rounded down, and for Vim-S
_TARGETS = (70, 76)
_GRACE_SECONDS = 60  # for a checkpoint to be saved


@dataclass(frozen=True)
class Stage:
    """A command, and where its output goes."""

    name: str
    words: list[str]


def stages(dataset_name: str, output_dir: Path) -> list[Stage]:
    """All stages, the most valuable one first."""
    python, data = sys.executable, ["--dataset_name", dataset_name]
    train = [
        python,
        str(TRAINING / "train.py"),
        "--config",
        str(TRAINING / "configs" / "cifar100_native32.yaml"),
        *data,
    ]
    train += ["--mixed_precision", "bf16", "--num_train_epochs", "100", "--per_device_train_batch_size", "256"]
    train += ["--learning_rate", "0.002", "--evaluation_epochs", "2", "--release_dtype", "bfloat16"]
    train += ["--resume_from_checkpoint", "latest"]
    benchmark = [python, str(TRAINING / "benchmark.py"), "--suite", "gpu", "--device", "cuda"]
    table = [python, str(TRAINING / "reproduce.py"), "--table", "1", "--scale", "native32", *data, "--epochs", "30"]
    return [
        Stage("tests", [python, "-m", "pytest", "-q", "-m", "gpu", str(TRAINING.parent / "tests")]),
        Stage("benchmark", [*benchmark, "--output_dir", str(output_dir / "benchmark")]),
        *(Stage(name, [*train, "--fusion_strategy", name, "--output_dir", str(output_dir / name)]) for name in _RUNS),
        Stage("table1", [*table, "--mixed_precision", "bf16", "--output_dir", str(output_dir)]),
    ]


def run_stage(stage: Stage, log: Path, deadline: float) -> int | None:
    """Run a stage until it ends or `time.monotonic()` is at `deadline`. Returns its exit code, None if stopped."""
    with log.open("a") as file:
        file.write(f"$ {shlex.join(stage.words)}\n")
        file.flush()
        process = subprocess.Popen(
            stage.words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def accuracy_over_time(output_dir: Path) -> dict[str, Any]:
    """Of each run so far: its scores over seconds of training, and when it first passed each target.

    The seconds are those of training alone, without the scoring between epochs.
    """
    curves = {}
    for name in _RUNS:
        if not (output_dir / name / METRICS_FILE).exists():
            continue
        scored = [record for record in read_log(output_dir / name) if "top1" in record]
        if (output_dir / name / RESULTS_FILE).exists():  # of the last epoch, which is not in the log
            results = json.loads((output_dir / name / RESULTS_FILE).read_text())
            scored.append({**results, "epoch": results["epochs"]})
        points = [{key: record[key] for key in ("epoch", "train_seconds", "top1", "ema_top1")} for record in scored]
        passed = {
            str(target): next((point["train_seconds"] for point in points if point["top1"] >= target), None)
            for target in _TARGETS
        }
        curves[name] = {"points": points, "seconds_to_top1": passed}
    return curves


def plot(curves: dict[str, Any], path: Path) -> None:
    """Top-1 over minutes of training, a line per run."""
    with plot_to(path, 6, 4) as (axis,):
        for name, color in zip(_RUNS, ("tab:orange", "tab:gray")):
            points = curves.get(name, {}).get("points", [])
            minutes = [point["train_seconds"] / 60 for point in points]
            axis.plot(minutes, [point["top1"] for point in points], "o-", color=color, markersize=3, label=name)
        for target in _TARGETS:
            axis.axhline(target, color="lightgray", zorder=0)
        axis.set(xlabel="minutes of training", ylabel="top-1, %")
        axis.legend()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar100", help="CIFAR-100: its Hub id or a local folder")
    parser.add_argument(
        "--minutes", type=float, default=30, help="when these are over, the rest waits for another call"
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these, in this order")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="folder of all results")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: expected a number above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    by_name = {stage.name: stage for stage in stages(args.dataset_name, args.output_dir)}
    unknown = [name for name in args.stages or () if name not in by_name]
    if unknown:
        sys.exit(f"error: --stages {' '.join(unknown)}: expected some of {' '.join(by_name)}")
    chosen = [by_name[name] for name in args.stages or by_name]
    if args.list:
        print("\n".join(shlex.join(stage.words) for stage in chosen))
        return
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --list prints the commands that would be run")

    for number in (signal.SIGTERM, signal.SIGHUP):  # of a job manager, of a terminal that closes: stop the stage too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    deadline = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = args.output_dir / "stages.json"
    exit_codes = json.loads(record.read_text()) if record.exists() else {}
    for stage in chosen:
        if exit_codes.get(stage.name) == 0:
            print(f"{stage.name}: finished before", flush=True)
            continue
        log = args.output_dir / f"{stage.name}.log"
        print(f"{stage.name}: running, see {log}", flush=True)
        try:
            exit_codes[stage.name] = run_stage(stage, log, deadline)
        except KeyboardInterrupt:
            sys.exit(f"{stage.name}: stopped; run the same command again to resume")
        record.write_text(json.dumps(exit_codes, indent=1) + "\n")
        curves = accuracy_over_time(args.output_dir)
        (args.output_dir / "accuracy_over_time.json").write_text(json.dumps(curves, indent=1) + "\n")
        plot(curves, args.output_dir / "accuracy_over_time.png")
        if exit_codes[stage.name] is None:
            sys.exit(f"{stage.name}: stopped, the time is up; run the same command again to resume")
        print(f"{stage.name}: exit code {exit_codes[stage.name]}", flush=True)
    failed = [stage.name for stage in chosen if exit_codes[stage.name] != 0]
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, see the logs in {args.output_dir}")


if __name__ == "__main__":
    main()
