"""Write a static site to try a trained classifier: it runs on the visitor's device, and any server of files will do.

    python training/export_web.py model_cards/fambav-cifar100 outputs/site
    python -m http.server --directory outputs/site

The page takes an image or the camera, and shows classes, tokens per layer, which patches have become one, and how
long an image takes, with the model's fusion and without. Nothing on it comes from elsewhere, and no image leaves the
device. ONNX Runtime for browsers comes from npm, or from `--onnxruntime_web`. Images in the folder `examples` of the
model's folder are offered to choose from; `--examples` offers others.
"""

import argparse
from pathlib import Path

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.data.image_file import find_examples
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.export.onnx_file import check_packages
from fambav_training.export.onnxruntime_web import runtime_files
from fambav_training.export.web_site import write_site


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("site", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--examples", nargs="*", type=Path, metavar="image", help="image files to choose from")
    parser.add_argument(
        "--onnxruntime_web", type=Path, metavar="FOLDER", help="the npm package of that name; npm gets it if not given"
    )
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    with one_line_errors():
        check_packages()
        examples = find_examples(args.model, args.examples)
        model, processor = load_classifier(args.model, config_overrides(args))
        with runtime_files(args.onnxruntime_web) as runtime:
            name = Path(args.model).resolve().name
            write_site(model.eval().float(), processor, name, examples, runtime, args.site)
    num_bytes = sum(path.stat().st_size for path in args.site.rglob("*") if path.is_file())
    print(f"{args.site}: {num_bytes / 2**20:.1f} MiB; to see it: python -m http.server --directory {args.site}")


if __name__ == "__main__":
    main()
