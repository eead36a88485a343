"""A page to try a trained classifier in the browser: its classes, which patches fuse, and what fusion costs and buys.

    python training/demo_app.py outputs/demo/upper --examples outputs/demo/digit.png

Prints the address of the page. It needs no network: nothing on it comes from elsewhere, and nothing is reported. Image
files in the folder `examples` of a model's folder are offered to choose from, with the fusion that `examples.json`
beside them names; `--examples` offers others.
"""

import argparse
import os
import sys
from pathlib import Path

from PIL import Image

from fambav_training.app.examples import make_examples
from fambav_training.app.trial import FusionTrial
from fambav_training.cli import one_line_errors
from fambav_training.data.image_file import find_examples
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.machine.memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("--examples", nargs="*", type=Path, metavar="image", help="image files to choose from")
    parser.add_argument("--host", help="address to listen on; GRADIO_SERVER_NAME or this machine only if not given")
    parser.add_argument("--port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 if not given")
    args = parser.parse_args()

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    try:
        from fambav_training.app.page import build_page, launch
    except ModuleNotFoundError as error:
        sys.exit(f'error: the page needs {error.name}: pip install -e ".[app]"')
    keep_freed_memory()
    with one_line_errors():
        if args.port is not None and not 0 < args.port < 65536:
            raise ValueError(f"--port {args.port}: expected 1 to 65535")
        examples = find_examples(args.model, args.examples)
        trial = FusionTrial(*load_classifier(args.model, {}))
        trial.answer(Image.new("RGB", (1, 1)), trial.config.fusion_strategy, trial.most_tokens)  # compiles the kernels
        page = build_page(trial, Path(args.model).resolve().name, make_examples(trial, examples))
        launch(page, args.host, args.port)


if __name__ == "__main__":
    main()
