"""Show which patches of an image become one token, layer by layer.

    python training/visualize_fusion.py outputs/demo/upper outputs/demo/digit.png --gif

For every image NAME.EXT it writes to `--output_dir`
    NAME_fusion.png        the image as the model sees it, then for each layer that fuses all patches of a token in
                           their average colour, outlined; patches of one token need not touch
    NAME_similarity.png    cosine similarity between the normed tokens that enter each layer
    NAME_fusion.gif        with `--gif`: the same layers as an animation beside the image

Layers are counted from 1, as in the paper and in the other pictures of this repository.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.cli import add_model_flags, config_overrides
from fambav_training.data.pixels import normalize, to_pixels
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.pictures.drawing import draw_tokens, magnify, patch_tokens
from fambav_training.pictures.figures import heat_map_figure, tile_figure
from modeling_fambav import FambaVConfig

_TILE_SIDE = 256  # pixels, about
_SMALLEST_PATCH = 8  # pixels, so that lines of two leave something to see
_FRAME_MILLISECONDS = 700
_LAST_FRAME_MILLISECONDS = 2000


class FusionTrace(NamedTuple):
    """What a model did with one image, layer by layer.

    Attributes:
        pixels: uint8 `(H, W, 3)`, the image at the size of the model.
        tokens: per layer int `(rows, columns)`, which of the tokens that it scans carries each patch.
        similarities: per layer float32 `(T, T)`, cosine similarities of the T normed tokens that enter it.
        probabilities: float32 `(num_labels,)`, of every class.
        label: the predicted class.
        probability: of that class, in [0, 1].
    """

    pixels: np.ndarray
    tokens: list[np.ndarray]
    similarities: list[np.ndarray]
    probabilities: np.ndarray
    label: str
    probability: float


@torch.inference_mode()
def trace_fusion(model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image) -> FusionTrace:
    """Classify an image of any mode and size, and keep what fusion did.

    Raises:
        ValueError: if the processor makes images of another size than the model takes.
    """
    pixels = to_pixels(image, processor)
    config = model.config
    outputs = model.eval()(
        normalize(pixels.unsqueeze(0), processor), output_token_maps=True, output_hidden_states=True
    )
    grid = config.patch_grid_of(*pixels.shape[1:])
    class_index = model.fambav.embeddings.class_index_of(grid[0] * grid[1])
    probabilities = outputs.logits[0].float().softmax(dim=0)
    probability, index = probabilities.max(dim=0)
    return FusionTrace(
        pixels=pixels.permute(1, 2, 0).numpy(),
        tokens=[patch_tokens(token_map[0].numpy(), class_index, grid) for token_map in outputs.token_maps],
        similarities=[
            cosine_similarities(layer.norm(hidden_states)[0]).numpy()
            for layer, hidden_states in zip(model.fambav.layers, outputs.hidden_states)
        ],
        probabilities=probabilities.numpy(),
        label=config.id2label[index.item()],
        probability=probability.item(),
    )


def cosine_similarities(tokens: Tensor) -> Tensor:
    """`(T, D)` to float32 `(T, T)`."""
    directions = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return directions @ directions.mT


def layers_that_fuse(config: FambaVConfig) -> list[int]:
    """The layers that fuse, counted from 0."""
    return [layer for layer, removed in enumerate(config.tokens_removed) if removed]


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


def no_fusion(config: FambaVConfig) -> str:
    """The sentence that stands for the drawings of a model that does not fuse."""
    return f"No layer fuses: all {config.num_hidden_layers} scan {config.num_patches + 1} tokens."


def read_image(path: Path) -> Image.Image:
    """Read an image, upright.

    Raises:
        ValueError: if the file is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: this image cannot be read: {error}") from error


def check_names(paths: Sequence[Path]) -> None:
    """Pictures are named after their images.

    Raises:
        ValueError: if two images would have the same pictures.
    """
    first_of = {}
    for path in paths:
        if path.stem in first_of:
            raise ValueError(f"{path}: its pictures would replace those of {first_of[path.stem]}; rename one")
        first_of[path.stem] = path


def layer_indices(numbers: Sequence[int] | None, num_layers: int) -> list[int] | None:
    """Layers counted from 0 for those counted from 1, in ascending order.

    Raises:
        ValueError: if there is no such layer.
    """
    if numbers is None:
        return None
    for number in numbers:
        if not 1 <= number <= num_layers:
            raise ValueError(f"--layers {number}: expected numbers from 1 to {num_layers}")
    return sorted({number - 1 for number in numbers})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("images", nargs="+", type=Path, metavar="image", help="image file")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/fusion"), help="where to write")
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="layers to show, counted from 1; those that fuse by default"
    )
    parser.add_argument("--gif", action="store_true", help="also write an animation over the layers")
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    try:
        check_names(args.images)
        images = [read_image(path) for path in args.images]
        model, processor = load_classifier(args.model, config_overrides(args))
        layers = layer_indices(args.layers, model.config.num_hidden_layers)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for path, image in zip(args.images, images):
            trace = trace_fusion(model, processor, image)
            files = write_pictures(trace, model.config, path.name, args.output_dir, layers, args.gif)
            print(f"{path}: {trace.label} ({trace.probability:.1%}); {', '.join(map(str, files))}")
    except (ValueError, StrictDataclassError, OSError) as error:
        sys.exit(f"error: {error}")
    if model.config.fusion_strategy == "none":
        print(no_fusion(model.config))


if __name__ == "__main__":
    main()
