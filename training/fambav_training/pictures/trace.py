"""What token fusion did with one image, layer by layer: tokens of the patches, similarities and the prediction."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.data.pixels import normalize, to_pixels
from fambav_training.pictures.drawing import patch_tokens


class FusionTrace(NamedTuple):
    """What a model did with one image, layer by layer.

    Attributes:
        pixels: uint8 `(H, W, 3)`, the image at the size of the model.
        tokens: per layer int `(rows, columns)`, which of the tokens that it scans carries each patch.
        similarities: per layer float32 `(T, T)`, cosine similarities of the T normed tokens that enter it; none if
            they were not wanted.
        probabilities: float32 `(num_labels,)`, of every class.
        label: the predicted class.
        probability: of that class, in [0, 1].
    """

    pixels: np.ndarray
    tokens: list[np.ndarray]
    similarities: list[np.ndarray]
    probabilities: np.ndarray
    label: str
    probability: float


@torch.inference_mode()
def trace_fusion(
    model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image, similarities: bool = True
) -> FusionTrace:
    """Classify an image of any mode and size, and keep what fusion did; similarities only if they are wanted.

    Raises:
        ValueError: if the processor makes images of another size than the model takes.
    """
    pixels = to_pixels(image, processor)
    config = model.config
    outputs = model.eval()(
        normalize(pixels.unsqueeze(0), processor), output_token_maps=True, output_hidden_states=similarities
    )
    grid = config.patch_grid_of(*pixels.shape[1:])
    class_index = model.fambav.embeddings.class_index_of(grid[0] * grid[1])
    probabilities = outputs.logits[0].float().softmax(dim=0)
    probability, index = probabilities.max(dim=0)
    return FusionTrace(
        pixels=pixels.permute(1, 2, 0).numpy(),
        tokens=[patch_tokens(token_map[0].numpy(), class_index, grid) for token_map in outputs.token_maps],
        similarities=[
            cosine_similarities(layer.norm(hidden_states)[0]).numpy()
            for layer, hidden_states in zip(model.fambav.layers, outputs.hidden_states or ())
        ],
        probabilities=probabilities.numpy(),
        label=config.id2label[index.item()],
        probability=probability.item(),
    )


def cosine_similarities(tokens: Tensor) -> Tensor:
    """`(T, D)` to float32 `(T, T)`."""
    directions = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return directions @ directions.mT
