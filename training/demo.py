"""Train the quickstart model without and with token fusion, compare the two, and classify a digit.

    make demo

Leaves the two models in outputs/demo/none and outputs/demo/upper, and a plot in outputs/demo/demo.png. Stopped and run
again, it continues where it was.
"""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import pipeline

from fambav_training.data.labeled_images import DIGITS, load_labeled_images
from fambav_training.markdown import markdown_table
from fambav_training.plots import plot_to
from fambav_training.processes import exit_on_signal, run_to_end, train_command
from fambav_training.release.saving import CHECKPOINTS, RESULTS_FILE

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
OUTPUT = Path("outputs/demo")
STRATEGIES = ("none", "upper")


def train(strategy: str) -> dict[str, Any]:
    """Train in a process of its own, whose memory is its own, and return its results."""
    folder = OUTPUT / strategy
    print(f"\nTraining with fusion_strategy={strategy} ...", flush=True)
    words = [f"--config={CONFIG}", f"--fusion_strategy={strategy}", f"--output_dir={folder}", "--mixed_precision=no"]
    # Of a demo that was stopped. A training that was finished by then has a checkpoint of its end.
    words += ["--resume_from_checkpoint=latest", "--checkpointing_steps=epoch", "--checkpoints_total_limit=1"]
    # One thread, as accelerate's launcher gives a process
    exit_code = run_to_end(train_command(words), OMP_NUM_THREADS="1")
    if exit_code != 0:
        sys.exit(f"error: training with fusion_strategy={strategy} ended with exit code {exit_code}")
    return json.loads((folder / RESULTS_FILE).read_text())


def compare(results: dict[str, dict[str, Any]]) -> str:
    """The table of `make demo`."""
    rows = [
        {
            "fusion": strategy,
            "top-1, %": f"{result['top1']:.2f}",
            "training, s": f"{result['train_seconds']:.1f}",
            "images/s": f"{result['images_per_second']:.0f}",
            "peak memory, MiB": f"{result['peak_memory_bytes'] / 2**20:.0f}",
            "of it for training": f"{(result['peak_memory_bytes'] - result['start_memory_bytes']) / 2**20:.0f}",
            "tokens per layer": " ".join(map(str, result["sequence_lengths"])),
        }
        for strategy, result in results.items()
    ]
    return markdown_table(rows)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Tokens per layer, training time and training memory, side by side."""
    colors = dict(zip(STRATEGIES, ("tab:gray", "tab:orange")))
    with plot_to(path, 11, 3.2, columns=3, width_ratios=(2, 1, 1)) as (tokens, seconds, memory):
        for strategy, result in results.items():
            lengths = result["sequence_lengths"]
            label = f"{strategy}: top-1 {result['top1']:.1f} %"
            tokens.plot(range(1, len(lengths) + 1), lengths, "o-", color=colors[strategy], label=label)
            training_mib = (result["peak_memory_bytes"] - result["start_memory_bytes"]) / 2**20
            for axis, value in ((seconds, result["train_seconds"]), (memory, training_mib)):
                axis.bar_label(axis.bar(strategy, value, color=colors[strategy]), fmt="%.0f")
        tokens.set(xlabel="layer", ylabel="tokens", title="tokens that each layer scans", ylim=0)
        tokens.legend(loc="lower left")
        seconds.set(title="training, s")
        memory.set(title="training memory, MiB")


def classify_held_out_digit(model: Path) -> str:
    """Classify the first digit that the model was not trained on, as a user would."""
    images = load_labeled_images(DIGITS)
    example = images.validation[0]
    path = OUTPUT / "digit.png"
    example[images.image_column].resize((64, 64)).save(path)
    classify = pipeline("image-classification", model=str(model), trust_remote_code=True)
    answers = ", ".join(f"{answer['label']} ({answer['score']:.1%})" for answer in classify(str(path), top_k=3))
    truth = images.label_names[example[images.label_column]]
    return f"A held-out digit, {path}, is a {truth}. pipeline({str(model)!r}) says: {answers}"


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table, and what it says."""
    none, upper = (results[strategy] for strategy in STRATEGIES)
    return (
        f"{compare(results)}\n\n"
        f"Fusion left {sum(upper['sequence_lengths']) / sum(none['sequence_lengths']):.0%} of the tokens to scan; "
        f"training took {upper['train_seconds'] / none['train_seconds']:.0%} of the time.\n"
        f"Measured on {none['device']}; plot: {OUTPUT / 'demo.png'}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    exit_on_signal(signal.SIGTERM)
    try:
        results = {strategy: train(strategy) for strategy in STRATEGIES}
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")
    for strategy in STRATEGIES:
        shutil.rmtree(OUTPUT / strategy / CHECKPOINTS, ignore_errors=True)  # so that the next demo starts anew
    plot(results, OUTPUT / "demo.png")
    text = f"{report(results)}\n{classify_held_out_digit(OUTPUT / 'upper')}"
    (OUTPUT / "demo.txt").write_text(f"{text}\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
