"""One image through one model with any fusion: what a page that is used by several people at once asks for."""

import threading
from typing import Any, NamedTuple

from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.data.pixels import normalize, to_pixels
from fambav_training.fusion.settings import STRATEGIES, UNFUSED, fused, with_fusion
from fambav_training.fusion.speed import Speedup, measured_speedup
from fambav_training.fusion.targets import most_tokens
from fambav_training.pictures.trace import FusionTrace, trace_fusion
from modeling_fambav import FambaVConfig

_TIMED_SECONDS = 1.0  # short, because somebody waits


class Answer(NamedTuple):
    """What a model says about an image with one fusion.

    Attributes:
        trace: the classes, and which patches fused.
        config: a configuration with that fusion.
        speedup: of a forward pass of this one image, against one without fusion.
    """

    trace: FusionTrace
    config: FambaVConfig
    speedup: Speedup

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
        pixel_values = normalize(to_pixels(image, self._processor).unsqueeze(0), self._processor)
        with self._lock, fused(self._model.config, fusion):
            trace = trace_fusion(self._model, self._processor, image)
            speedup = measured_speedup(self._model, pixel_values, {}, _TIMED_SECONDS)
        return Answer(trace, config, speedup)
