"""How fast a model is on this machine, with one fusion or another."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from fusion_settings import UNFUSED, fused

_MIN_ROUNDS = 5
_MIN_SECONDS = 1.0


@torch.inference_mode()
def forward_seconds(
    model: PreTrainedModel,
    pixel_values: Tensor,
    fusions: list[dict[str, Any]],
    min_seconds: float = _MIN_SECONDS,
    summary: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """Seconds of a forward pass with each of several fusions, warm.

    Passes are interleaved, so that all fusions share whatever else the machine is doing.

    Args:
        model: a Famba-V model; its configuration is afterwards what it was.
        pixel_values: a batch, on the model's device.
        fusions: fusion fields, see `fusion_settings.with_fusion`.
        min_seconds: how long to measure; five rounds at least.
        summary: of all rounds, for each fusion.

    Returns:
        the summary for each fusion, by default the median.
    """
    was_training = model.training
    model.eval()
    for fusion in fusions:  # warm-up: compilation, caches, the allocator
        _pass_seconds(model, pixel_values, fusion)
    seconds = [[] for _ in fusions]
    started = time.perf_counter()
    while len(seconds[0]) < _MIN_ROUNDS or time.perf_counter() - started < min_seconds:
        for values, fusion in zip(seconds, fusions):
            values.append(_pass_seconds(model, pixel_values, fusion))
    model.train(was_training)
    return [summary(values) for values in seconds]


def measured_speedup(model: PreTrainedModel, pixel_values: Tensor, fusion: dict[str, Any]) -> float:
    """How many times as fast the forward pass is with this fusion as with none; see `forward_seconds`."""
    unfused, ours = forward_seconds(model, pixel_values, [UNFUSED, fusion])
    return unfused / ours


def _pass_seconds(model: PreTrainedModel, pixel_values: Tensor, fusion: dict[str, Any]) -> float:
    with fused(model.config, fusion):
        _wait_for(pixel_values.device)
        started = time.perf_counter()
        model(pixel_values)
        _wait_for(pixel_values.device)
        return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
