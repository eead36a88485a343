"""How much faster a forward pass is with one fusion than without, on this machine, and how sure that is."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.fusion.settings import UNFUSED, fused

_MIN_ROUNDS = 5
_MIN_SECONDS = 1.0
_MAX_SECONDS = 10.0
# Uncertainty at which a measurement is good enough, as a share of its result
_PRECISION = 0.02


@dataclass(frozen=True)
class Speedup:
    """How many times as fast a forward pass is with some fusion as without.

    Attributes:
        times: median over the rounds, each of which has two passes without fusion and two with it.
        low, high: quartiles; half of the rounds lie between them.
        rounds: how many there were.
        seconds: median of the passes with fusion.
    """

    times: float
    low: float
    high: float
    rounds: int
    seconds: float

    @property
    def uncertainty(self) -> float:
        """How far `times` may be off, in about 19 of 20 measurements: 1.96 standard errors of a median.

        Such an error is 1.25 deviations over the root of the rounds, and the quartiles of a normal distribution are
        1.35 deviations apart.
        """
        return 1.96 * 1.25 / 1.35 * (self.high - self.low) / math.sqrt(self.rounds)

    @property
    def is_noisy(self) -> bool:
        """Whether it is still not precise after all the time that it was given."""
        return self.uncertainty > _PRECISION * self.times


@torch.inference_mode()
def measured_speedup(
    model: PreTrainedModel,
    pixel_values: Tensor,
    fusion: dict[str, Any],
    max_seconds: float = _MAX_SECONDS,
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> Speedup:
    """Time warm forward passes with this fusion and with none, in turn, until their ratio is known to 2%.

    A machine that does other work is slow for a while and fast again. The passes of a round share most of that, so
    each round gives a ratio of its own, and the median of these holds where seconds do not. In a round, the two with
    fusion stand between the two without, so that a machine that becomes slower favours neither.

    Args:
        model: a Famba-V model; its configuration is afterwards what it was.
        pixel_values: a batch, on the model's device.
        fusion: fusion fields, see `settings.with_fusion`.
        max_seconds: when to end a measurement that does not become precise; five rounds at least. One that does takes
            a second, or this if it is less.
        turn: entered for every pass, for those who share the model: they have theirs between two passes.
    """

    def pass_seconds(condition: dict[str, Any]) -> float:
        with turn():
            return _pass_seconds(model, pixel_values, condition)

    was_training = model.training
    model.eval()
    for condition in (UNFUSED, fusion):  # warm-up: compilation, caches, the allocator
        pass_seconds(condition)
    rounds = []
    started = time.perf_counter()
    while True:
        conditions = (UNFUSED, fusion, fusion, UNFUSED)
        seconds = [pass_seconds(condition) for condition in conditions]
        rounds.append(((seconds[0] + seconds[3]) / 2, (seconds[1] + seconds[2]) / 2))
        passed = time.perf_counter() - started
        if len(rounds) < _MIN_ROUNDS or passed < min(_MIN_SECONDS, max_seconds):
            continue
        result = _speedup_of(rounds)
        if not result.is_noisy or passed >= max_seconds:
            break
    model.train(was_training)
    return result


def _speedup_of(rounds: list[tuple[float, float]]) -> Speedup:
    """Of the seconds per pass without fusion and with it, of every round."""
    low, median, high = statistics.quantiles((unfused / ours for unfused, ours in rounds), n=4)
    return Speedup(median, low, high, len(rounds), statistics.median(ours for _, ours in rounds))


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
