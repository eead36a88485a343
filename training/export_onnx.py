"""Export a trained classifier to ONNX, for any batch size, and check it against the model.

    python training/export_onnx.py outputs/demo/upper outputs/demo/upper.onnx

The file takes `pixel_values` (batch, channels, height, width), float32, as the model's image processor makes them, and
gives `logits` (batch, labels). Image size and fusion are part of the graph: other fusion is another file
(`--fusion_strategy none`). It is only written if onnxruntime and the model agree.
"""

import argparse
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.evaluation.scoring import load_classifier
from modeling_fambav import set_selective_scan_backend
from modeling_fambav.selective_scan_torch import recurrence as torch_recurrence

TOLERANCE = 1e-4  # of a logit, in float32
_BATCH_SIZES = (1, 2, 5)
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write a classifier in evaluation mode, as its configuration now fuses, to an ONNX file for any batch size."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from fambav_training.export.onnx_scan import recurrence

    config = model.config
    pixel_values = torch.zeros(2, config.num_channels, *config.image_height_width)
    with _plain_operators(), _quiet():
        program = torch.onnx.export(
            model,
            (pixel_values,),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            custom_translation_table={torch_recurrence: recurrence},
            verbose=False,
        )
        # Stack traces with the paths of this machine, more bytes than the weights of a small model
        ClearMetadataAndDocStringPass()(program.model)
        program.save(path)


@contextmanager
def _plain_operators() -> Iterator[None]:
    """The model runs on torch's own operations, and on none of our kernels but `recurrence`."""
    own = set_selective_scan_backend("torch")
    try:
        yield
    finally:
        set_selective_scan_backend(own)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that it does not need and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def open_session(path: Path):
    """An `onnxruntime.InferenceSession` on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def differences(model: PreTrainedModel, path: Path) -> dict[int, float]:
    """Largest absolute difference of a logit between an ONNX file and the model, by batch size, on random images."""
    session = open_session(path)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for batch_size in _BATCH_SIZES:
        shape = (batch_size, model.config.num_channels, *model.config.image_height_width)
        pixel_values = torch.randn(shape, generator=generator)
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        found[batch_size] = np.abs(logits - model(pixel_values).logits.numpy()).max().item()
    return found


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


def check_packages() -> None:
    """Raises ValueError if a package is missing that export needs."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)}: not installed; pip install -e '.[onnx]' provides what export needs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("output", type=Path, help="file to write, NAME.onnx")
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    with one_line_errors():
        check_packages()
        model, _ = load_classifier(args.model, config_overrides(args))
        model = model.eval().float()
        with new_file(args.output) as path:
            started = time.perf_counter()
            export_onnx(model, path)
            seconds = time.perf_counter() - started
            found = differences(model, path)
            for batch_size, difference in found.items():
                print(f"batch size {batch_size}: logits differ from the model's by at most {difference:.1e}")
            # Not `>`, which a NaN would pass
            if not all(difference <= TOLERANCE for difference in found.values()):
                raise ValueError(
                    f"{args.output}: not written, expected logits within {TOLERANCE} of the model's; if this is rare, "
                    "two tokens were equally similar up to rounding, and --fusion_strategy none tells"
                )
            num_bytes = path.stat().st_size
    print(
        f"{args.output}: {num_bytes / 2**20:.1f} MiB, exported in {seconds:.0f} s, fusion "
        f"{model.config.fusion_strategy}, tokens per layer {' '.join(map(str, model.config.sequence_lengths))}"
    )


if __name__ == "__main__":
    main()
