"""Pictures of a traced image: tiles of its layers, and the files that `visualize_fusion.py` writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fambav_training.pictures.drawing import draw_tokens, magnify
from fambav_training.pictures.figures import heat_map_figure, tile_figure
from fambav_training.pictures.trace import FusionTrace
from modeling_fambav import FambaVConfig

_TILE_SIDE = 256  # pixels, about
_SMALLEST_PATCH = 8  # pixels, so that lines of two leave something to see
_FRAME_MILLISECONDS = 700
_LAST_FRAME_MILLISECONDS = 2000


def layers_that_fuse(config: FambaVConfig) -> list[int]:
    """The layers that fuse, counted from 0."""
    return [layer for layer, removed in enumerate(config.tokens_removed) if removed]


def no_fusion(config: FambaVConfig) -> str:
    """The sentence that stands for the drawings of a model that does not fuse."""
    return f"No layer fuses: all {config.num_hidden_layers} scan {config.num_patches + 1} tokens."


def fusion_tiles(trace: FusionTrace, layers: Sequence[int]) -> tuple[list[np.ndarray], list[str]]:
    """The image and a drawing for each of these layers (counted from 0), and their titles."""
    sides, grid = trace.pixels.shape[:2], trace.tokens[0].shape
    smallest_scale = max(-(-_SMALLEST_PATCH * patches // side) for patches, side in zip(grid, sides))
    scale = max(1, round(_TILE_SIDE / max(sides)), smallest_scale)
    tiles, titles = [magnify(trace.pixels, scale)], ["the image as the model sees it"]
    for layer in layers:
        tokens = trace.tokens[layer]
        tiles.append(draw_tokens(trace.pixels, tokens, scale))
        # The class token is one more
        titles.append(f"layer {layer + 1}: {len(np.unique(tokens)) + 1} of {tokens.size + 1} tokens")
    return tiles, titles


def write_pictures(
    trace: FusionTrace,
    config: FambaVConfig,
    name: str,
    folder: Path,
    layers: Sequence[int] | None = None,
    gif: bool = False,
) -> list[Path]:
    """Write all pictures of one image.

    Args:
        trace: of the image.
        config: of the model.
        name: of the image file.
        folder: where to write.
        layers: those to show, counted from 0; by default those that fuse, and for similarities all.
        gif: also write an animation.

    Returns:
        the files.
    """
    stem = Path(name).stem
    files = [folder / f"{stem}_fusion.png", folder / f"{stem}_similarity.png"]
    fused = layers_that_fuse(config)
    heading = [f"{name}: predicted {trace.label} ({trace.probability:.1%})"]
    if not fused:
        heading.append(no_fusion(config))
    tiles, titles = fusion_tiles(trace, fused if layers is None else layers)
    Image.fromarray(tile_figure(tiles, titles, heading)).save(files[0], optimize=True)

    compared = range(config.num_hidden_layers) if layers is None else layers
    matrices = [trace.similarities[layer] for layer in compared]
    entering = [f"layer {layer + 1}: {len(matrix)} tokens" for layer, matrix in zip(compared, matrices)]
    lines = [heading[0], "cosine similarity of the tokens that enter each layer, before it fuses"]
    Image.fromarray(heat_map_figure(matrices, entering, lines)).save(files[1], optimize=True)

    if gif:
        files.append(folder / f"{stem}_fusion.gif")
        write_animation(tiles, titles, heading, files[-1])
    return files


def write_animation(tiles: Sequence[np.ndarray], titles: Sequence[str], heading: Sequence[str], path: Path) -> None:
    """Write a GIF that shows the first tile, and beside it the others one after another."""
    shown = [[0, number] for number in range(1, len(tiles))] or [[0]]
    frames = [
        Image.fromarray(tile_figure([tiles[number] for number in pair], [titles[number] for number in pair], heading))
        for pair in shown
    ]
    durations = [_FRAME_MILLISECONDS] * (len(frames) - 1) + [_LAST_FRAME_MILLISECONDS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
