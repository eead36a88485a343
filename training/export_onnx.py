"""Export a trained classifier to ONNX, for any batch size, and check it against the model.

    python training/export_onnx.py outputs/demo/upper outputs/demo/upper.onnx

The file takes `pixel_values` (batch, channels, height, width), float32, as the model's image processor makes them, and
gives `logits` (batch, labels). Image size and fusion are part of the graph: other fusion is another file
(`--fusion_strategy none`). `--token_maps` adds an output, int64 (batch, layers, tokens): the token that carries each
initial token. The file is only written if onnxruntime and the model agree.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.export.onnx_file import check_packages, export_checked


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` if all goes well and is removed if not.

    Raises:
        ValueError: if `path` exists.
        OSError: if it cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path}: exists already; remove it or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.touch()  # fails here and not after minutes of export
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("output", type=Path, help="file to write, NAME.onnx")
    parser.add_argument("--token_maps", action="store_true", help="also give the token that carries each patch")
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    with one_line_errors():
        check_packages()
        model, _ = load_classifier(args.model, config_overrides(args))
        model = model.eval().float()
        with new_file(args.output) as path:
            started = time.perf_counter()
            found = export_checked(model, path, args.token_maps)
            seconds = time.perf_counter() - started
            num_bytes = path.stat().st_size
    for batch_size, difference in found.items():
        print(f"batch size {batch_size}: logits differ from the model's by at most {difference:.1e}")
    print(
        f"{args.output}: {num_bytes / 2**20:.1f} MiB, exported and checked in {seconds:.0f} s, fusion "
        f"{model.config.fusion_strategy}, tokens per layer {' '.join(map(str, model.config.sequence_lengths))}"
    )


if __name__ == "__main__":
    main()
