"""One image through one model with any fusion: what a page that is used by several people at once asks for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.fusion.settings import STRATEGIES, UNFUSED, fused, with_fusion
from fambav_training.fusion.speed import Speedup, measured_speedup
from fambav_training.fusion.targets import most_tokens
from fambav_training.pictures.trace import FusionTrace, trace_fusion
from modeling_fambav import FambaVConfig

_TIMED_SECONDS = 1.0  # short, because somebody waits
_GIVE_WAY_SECONDS = 0.001  # a lock that is taken again at once is never free for others


class Answer(NamedTuple):
    """What a model says about an image with one fusion.

    Attributes:
        trace: the classes, and which patches fused.
        config: a configuration with that fusion.
        speedup: of a forward pass of one image, against one without fusion; None if it has not been measured yet.
    """

    trace: FusionTrace
    config: FambaVConfig
    speedup: Speedup | None

    @property
    def probabilities(self) -> dict[str, float]:
        """Of every class, by name."""
        return {self.config.id2label[index]: float(value) for index, value in enumerate(self.trace.probabilities)}


class FusionTrial:
    """A trained classifier that answers with another fusion each time, from any number of threads.

    Attributes:
        config: the configuration it was made with, whatever the threads are trying.
        strategies: those that can be asked for; `"custom"` is one only if the model has a schedule of its own.
        most_tokens: the most that one layer can remove.
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor):
        self._model, self._processor = model.eval(), processor
        # Fusion is a setting of the one model that all threads share, and a speed is only one if nobody else computes
        self._lock = threading.Lock()
        self._measuring = threading.Lock()
        self._speedups: dict[tuple[int, ...], Speedup] = {}  # by the tokens that each layer removes
        self.config = with_fusion(model.config, {})
        self.strategies = [UNFUSED["fusion_strategy"], *STRATEGIES]
        if self.config.fusion_strategy not in self.strategies:
            self.strategies.append(self.config.fusion_strategy)
        self.most_tokens = most_tokens(self.config)

    def fusion(self, strategy: str, tokens: int) -> dict[str, Any]:
        """Fusion fields for a strategy and its tokens per layer; the model's own strategy keeps its own layers."""
        if strategy == self.config.fusion_strategy:
            return {"fusion_tokens": tokens}
        return {"fusion_strategy": strategy, "fusion_tokens": tokens}

    def answer(self, image: Image.Image, strategy: str, tokens: int) -> Answer:
        """Classify an image of any mode and size with a strategy and a number of tokens per fused layer.

        Raises:
            ValueError, StrictDataclassError: if that fusion would remove no token, or there is no such strategy.
        """
        fusion = self.fusion(strategy, tokens)
        config = with_fusion(self.config, fusion)
        with self._lock, fused(self._model.config, fusion):
            trace = trace_fusion(self._model, self._processor, image, similarities=False)
        return Answer(trace, config, self._speedups.get(tuple(config.tokens_removed)))

    def speedup(self, strategy: str, tokens: int) -> Speedup:
        """Of a fusion, whatever the image is: measured the first time, while others get their answers.

        Raises:
            ValueError, StrictDataclassError: as `answer`.
        """
        fusion = self.fusion(strategy, tokens)
        removed = tuple(with_fusion(self.config, fusion).tokens_removed)
        with self._measuring:
            if removed not in self._speedups:
                pixel_values = torch.zeros(1, self.config.num_channels, *self.config.image_height_width)
                measured = measured_speedup(self._model, pixel_values, fusion, _TIMED_SECONDS, self._turn)
                self._speedups[removed] = measured
            return self._speedups[removed]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        time.sleep(_GIVE_WAY_SECONDS)
        with self._lock:
            yield
