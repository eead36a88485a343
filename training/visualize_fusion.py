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
from collections.abc import Sequence
from pathlib import Path

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.data.image_file import read_image
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.pictures.fusion_pictures import no_fusion, write_pictures
from fambav_training.pictures.trace import trace_fusion


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
    with one_line_errors():
        check_names(args.images)
        images = [read_image(path) for path in args.images]
        model, processor = load_classifier(args.model, config_overrides(args))
        layers = layer_indices(args.layers, model.config.num_hidden_layers)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for path, image in zip(args.images, images):
            trace = trace_fusion(model, processor, image)
            files = write_pictures(trace, model.config, path.name, args.output_dir, layers, args.gif)
            print(f"{path}: {trace.label} ({trace.probability:.1%}); {', '.join(map(str, files))}")
    if model.config.fusion_strategy == "none":
        print(no_fusion(model.config))


if __name__ == "__main__":
    main()
