"""One classifier in several precisions: how right, how large and how fast each of them is, measured side by side."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.export.quantization import METHODS, TORCHAO_METHODS, quantize_onnx, quantize_torch, weight_bytes

BATCH_SIZES = (1, 32)
_SCORED_BATCH = 100
_IMAGES_PER_TIMING = 8  # at least; a pass of one image is too short for the clock


@dataclass(frozen=True)
class Precision:
    """A classifier in some precision.

    Attributes:
        name: where it runs and of which numbers.
        num_bytes: of its file of weights, or of the whole ONNX file.
        logits: of `(B, C, H, W)` float32 to `(B, num_labels)` float32.
    """

    name: str
    num_bytes: int
    logits: Callable[[Tensor], np.ndarray]


def in_torch(model: PreTrainedModel, name: str, num_bytes: int) -> Precision:
    """A model in evaluation mode, which is given images in its own precision."""

    @torch.inference_mode()
    def logits(pixel_values: Tensor) -> np.ndarray:
        return model(pixel_values.to(model.dtype)).logits.float().numpy()

    return Precision(name, num_bytes, logits)


def in_onnx_runtime(path: Path, name: str) -> Precision:
    """An ONNX file, run by one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Precision(
        name, path.stat().st_size, lambda pixels: session.run(["logits"], {"pixel_values": pixels.numpy()})[0]
    )


def all_precisions(model: PreTrainedModel, exported: Path, folder: Path, calibration: Tensor) -> list[Precision]:
    """The model in float32, first, in bfloat16 and in eight bits; those of torchao only if it is installed.

    Args:
        model: a classifier in evaluation mode and float32, loaded from a folder or the Hub.
        exported: its ONNX file.
        folder: where the quantised files are written, `METHOD.onnx`.
        calibration: `(images, channels, height, width)`, for static scales.
    """
    half = type(model).from_pretrained(model.name_or_path, config=model.config, dtype=torch.bfloat16).eval()
    found = [
        in_torch(each, f"torch, {name}", _saved_bytes(each)) for each, name in ((model, "float32"), (half, "bfloat16"))
    ]
    if find_spec("torchao") is not None:
        for method in TORCHAO_METHODS:
            quantized = quantize_torch(model, method)
            found.append(in_torch(quantized, f"torchao, int8 {method}", weight_bytes(quantized)))
    found.append(in_onnx_runtime(exported, "ONNX Runtime, float32"))
    for method in METHODS:
        path = folder / f"{method}.onnx"
        quantize_onnx(exported, path, method, calibration)
        found.append(in_onnx_runtime(path, f"ONNX Runtime, int8 {method}"))
    return found


def _saved_bytes(model: PreTrainedModel) -> int:
    """Of the weights as safetensors."""
    return len(save({name: weight.contiguous() for name, weight in model.state_dict().items()}))


def measure_precisions(
    precisions: Sequence[Precision], images: CachedImages, processor: BaseImageProcessor, rounds: int
) -> list[dict[str, Any]]:
    """Score all on the same images, and time them in turn.

    Args:
        precisions: the first is what the others are compared with.
        images: those to score; their labels are indices of the logits.
        processor: of the model.
        rounds: of timing; a round has every precision once, and the median is of the rounds.

    Returns:
        per precision `name`, `bytes`, `top1` and `same_class` (percent of the images), and by batch size
        `milliseconds` (processor time per image of one thread) and `relative` (to the first).
    """
    correct, same = np.zeros(len(precisions), int), np.zeros(len(precisions), int)
    for pixels, labels in zip(images.pixels.split(_SCORED_BATCH), images.labels.split(_SCORED_BATCH)):
        pixel_values = normalize(pixels, processor)
        classes = np.stack([precision.logits(pixel_values).argmax(-1) for precision in precisions])
        correct += (classes == labels.numpy()).sum(axis=1)
        same += (classes == classes[0]).sum(axis=1)
    times = {size: _times(precisions, normalize(images.pixels[:size], processor), rounds) for size in BATCH_SIZES}
    return [
        {
            "name": precision.name,
            "bytes": precision.num_bytes,
            "top1": 100 * int(correct[index]) / len(images),
            "same_class": 100 * int(same[index]) / len(images),
            "milliseconds": {size: statistics.median(seconds[index]) for size, seconds in times.items()},
            "relative": {
                size: statistics.median(own / first for own, first in zip(seconds[index], seconds[0]))
                for size, seconds in times.items()
            },
        }
        for index, precision in enumerate(precisions)
    ]


def _times(precisions: Sequence[Precision], pixel_values: Tensor, rounds: int) -> list[list[float]]:
    """Processor milliseconds per image of every precision in every round."""
    repeats = max(1, _IMAGES_PER_TIMING // len(pixel_values))
    found: list[list[float]] = [[] for _ in precisions]
    for number in range(rounds):
        # Whoever follows whom changes with the round
        order = list(range(number % len(precisions), len(precisions))) + list(range(number % len(precisions)))
        for index in order:
            precisions[index].logits(pixel_values)  # its weights and code are in the caches again
            started = time.process_time()
            for _ in itertools.repeat(None, repeats):
                precisions[index].logits(pixel_values)
            found[index].append(1000 * (time.process_time() - started) / repeats / len(pixel_values))
    return found


def precision_table(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, as a table in Markdown."""
    lines = [
        "| precision | size, MB | top-1, % | same class as the first, % | ms per image, batch 1 | batch 32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{row['milliseconds'][size]:.2f} ({row['relative'][size]:.2f})" for size in BATCH_SIZES]
        numbers = f"{row['bytes'] / 1e6:.2f} | {row['top1']:.2f} | {row['same_class']:.2f}"
        lines.append(f"| {row['name']} | {numbers} | {' | '.join(times)} |")
    return "\n".join(lines)
