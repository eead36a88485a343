"""Time and memory of Famba-V, with and without token fusion, beside DeiT of the same size.

    make bench                                             # this machine, about ten minutes on two cores
    python training/benchmark.py --suite gpu --device cuda # everything that only a GPU can show, under ten minutes

Times are medians over interleaved rounds after a warm-up, so that all cases of a table share whatever the machine is
doing; compare figures within one run only. Memory is the peak of training steps beside the weights, in a process of
its own on a CPU, of what torch allocated on a GPU. Writes benchmark.json, benchmark.md and benchmark.png to
`--output_dir`.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from fambav_training.benchmark.cases import SMALL_R, SUITES, Case
from fambav_training.benchmark.measurement import measure, measure_core_operations
from fambav_training.benchmark.report import break_even, core_operations_sentence, plot, table
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.provenance import environment
from modeling_fambav import set_selective_scan_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu", help="which cases to measure")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per table")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="folder for the reports")
    args = parser.parse_args()
    keep_freed_memory()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    report = {"environment": environment(Accelerator(cpu=device.type == "cpu")), "rounds": args.rounds, "results": {}}
    text = [f"Measured on {report['environment']['device']}, torch {torch.__version__}.\n"]
    if device.type == "cpu":
        report["core_operations"] = measure_core_operations(device, args.rounds)
        text += [core_operations_sentence(report["core_operations"]), ""]
        print(text[-2], flush=True)
    for title, cases in SUITES[args.suite]().items():
        cases = _runnable(cases)
        records = measure(cases, device, args.rounds, train=True, with_memory=title != SMALL_R)
        report["results"][title] = records
        section = [f"### {title}\n", table(records), ""]
        if title == SMALL_R:
            section += [break_even(records), ""]
        text += section
        print("\n".join(section), flush=True)
        # After every table, so that an interrupted run keeps what it measured.
        _write(report, text, args.output_dir)
    plot(report["results"], args.output_dir / "benchmark.png")


def _runnable(cases: list[Case]) -> list[Case]:
    """The cases whose scan backend is installed; the others are named."""
    runnable = []
    for case in cases:
        try:
            set_selective_scan_backend(case.backend)
            runnable.append(case)
        except ImportError as error:
            print(f"left out: {case.label}, {error}")
    return runnable


def _write(report: dict, text: list[str], folder: Path) -> None:
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "benchmark.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
