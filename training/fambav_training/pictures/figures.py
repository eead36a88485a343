"""Figures of token fusion, as arrays: tiles with titles, and similarities as heat maps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# All lengths are pixels.
_DPI = 100
_GAP = 16
_TITLE_HEIGHT = 24
_LINE_HEIGHT = 22
_COLOR_BAR_WIDTH = 80
_HEAT_MAP_SIDE = 240
_SMALLEST_CELL = 200  # room for a title
_SMALLEST_WIDTH = 480  # room for a heading
_HEADING_LETTER = 8
_COLORS = "magma"


def tile_figure(tiles: Sequence[np.ndarray], titles: Sequence[str], heading: Sequence[str]) -> np.ndarray:
    """Images side by side, in rows, pixel by pixel.

    Args:
        tiles: uint8 `(H, W, 3)`, all of one size.
        titles: one per tile, written above it.
        heading: lines above all tiles; what is longer than the figure is wide is cut.

    Returns:
        uint8 `(height, width, 3)`.
    """
    figure, axes = _figure(len(tiles), *tiles[0].shape[:2], titles, heading)
    for axis, tile in zip(axes, tiles):
        axis.imshow(tile, interpolation="nearest", aspect="auto")
    return _render(figure)


def heat_map_figure(matrices: Sequence[np.ndarray], titles: Sequence[str], heading: Sequence[str]) -> np.ndarray:
    """Heat maps of similarities with one colour scale, from the lowest of all to 1.

    Args:
        matrices: float `(T, T)`, similarities of T tokens; T may differ.
        titles, heading: as of `tile_figure`.

    Returns:
        uint8 `(height, width, 3)`.
    """
    side = _HEAT_MAP_SIDE
    figure, axes = _figure(len(matrices), side, side, titles, heading, right=_COLOR_BAR_WIDTH)
    lowest = min(matrix.min() for matrix in matrices)
    for axis, matrix in zip(axes, matrices):
        # A map may have more tokens than its tile has pixels
        image = axis.imshow(matrix, cmap=_COLORS, vmin=lowest, vmax=1, interpolation="antialiased", aspect="auto")
    box = axes[0].get_position()
    left = 1 - (_COLOR_BAR_WIDTH - _GAP) / (_DPI * figure.get_figwidth())
    bar = figure.add_axes((left, box.y0, 12 / (_DPI * figure.get_figwidth()), box.height))
    figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=8)
    return _render(figure)


def columns_for(num_tiles: int) -> int:
    """Columns of a nearly square arrangement with few empty places; rather wide than high."""
    fewest = math.ceil(math.sqrt(num_tiles))
    return min(range(fewest, fewest + 4), key=lambda columns: -num_tiles % columns)


def _figure(
    num_tiles: int, height: int, width: int, titles: Sequence[str], heading: Sequence[str], right: int = 0
) -> tuple[Figure, list[Axes]]:
    """A figure with an axis of exactly `height` x `width` pixels per tile, and `right` pixels free beside them."""
    columns = columns_for(num_tiles)
    cell_height, cell_width = height + _TITLE_HEIGHT + _GAP, max(width, _SMALLEST_CELL) + _GAP
    heading_height = _GAP + _LINE_HEIGHT * len(heading)
    total_height = heading_height + cell_height * math.ceil(num_tiles / columns)
    total_width = max(_GAP + cell_width * columns, _SMALLEST_WIDTH) + right

    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor="white")
    for number, line in enumerate(heading):
        figure.text(
            _GAP / total_width,
            1 - (_GAP + _LINE_HEIGHT * (number + 0.5)) / total_height,
            _shorten(line, total_width // _HEADING_LETTER),
            fontsize=10,
            fontweight="bold" if number == 0 else "normal",
            verticalalignment="center",
            parse_math=False,  # a file may be called $a$.png
        )
    axes = []
    for number, title in enumerate(titles):
        row, column = divmod(number, columns)
        left = _GAP + cell_width * column
        bottom = total_height - heading_height - cell_height * row - _TITLE_HEIGHT - height
        box = (left / total_width, bottom / total_height, width / total_width, height / total_height)
        axis = figure.add_axes(box)
        axis.set_axis_off()
        axis.set_title(title, fontsize=9, loc="left", pad=5)
        axes.append(axis)
    return figure, axes


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _render(figure: Figure) -> np.ndarray:
    """Draw a figure to uint8 `(height, width, 3)`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
