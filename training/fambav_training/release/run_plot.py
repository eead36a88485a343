"""The picture in a model card: how the loss fell, and how many tokens each layer scans."""

from pathlib import Path
from typing import Any

from fambav_training.plots import plot_to


def plot_run(records: list[dict[str, Any]], sequence_lengths: list[int], path: Path) -> None:
    """Plot a run to a PNG file.

    Args:
        records: lines of `metrics.jsonl`; those with a `top1`, if there are any, are drawn too.
        sequence_lengths: tokens that each layer scans.
        path: file to write.
    """
    with plot_to(path, 9, 3.2, columns=2) as (loss, tokens):
        losses = [(record["step"], record["train_loss"]) for record in records if "train_loss" in record]
        loss.plot(*zip(*losses), color="tab:gray")
        loss.set(xlabel="step", title="training loss")
        scores = [(record["step"], record["top1"]) for record in records if "top1" in record]
        if scores:
            accuracy = loss.twinx()
            accuracy.plot(*zip(*scores), "o-", color="tab:orange", markersize=3)
            accuracy.set_ylabel("top-1, %", color="tab:orange")
            accuracy.spines["top"].set_visible(False)
        tokens.bar(range(1, len(sequence_lengths) + 1), sequence_lengths, color="tab:orange")
        tokens.set(xlabel="layer", title="tokens that each layer scans")
