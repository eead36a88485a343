"""Plots to PNG files, all in one style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot_to(path: Path, width: float, height: float, columns: int = 1, **layout: Any) -> Iterator[list]:
    """Axes side by side to draw on; they are saved when the block ends.

    Args:
        path: PNG file to write.
        width, height: of the whole picture, in inches of 120 pixels.
        columns: number of axes.
        layout: more arguments of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure  # takes a second to import, and belongs to no window

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns, squeeze=False, **layout)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
