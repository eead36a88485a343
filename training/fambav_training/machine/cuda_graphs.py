"""Passes of a classifier as CUDA graphs: a launch each, instead of a thousand.

A small model is done with a kernel before the program has asked for the next one. Recorded once, a whole pass is
asked for at once, and computes the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Logits(nn.Module):
    """A classifier from tensor to tensor, as graphs need it, with matrix products in this dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self._dtype = model, dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        is_half = self._dtype != torch.float32
        # Weights that were converted outside of a graph would stay what they were then
        with torch.autocast(pixel_values.device.type, self._dtype, enabled=is_half, cache_enabled=False):
            return self.model(pixel_values=pixel_values).logits


def record_passes(
    model: nn.Module, batch_size: int, image_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Record forward and backward pass of a classifier in training mode; it does not change, nor do random numbers.

    Args:
        model: on a CUDA device.
        batch_size, image_size: of all images that it will see.
        dtype: of the matrix products; the model may have an autocast of its own instead.

    Returns:
        images `(batch_size, 3, H, W)` in float32 to logits `(batch_size, classes)`, with gradients of the weights.
        Both passes use memory of their own: what they give must be used before the next call.
    """
    device = next(model.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.randn(batch_size, 3, *image_size, device=device)
        graphed = torch.cuda.make_graphed_callables(_Logits(model, dtype), (images,))
    with torch.no_grad():
        for buffer, before in buffers:  # statistics of batch norm, which have seen those images
            buffer.copy_(before)
    return graphed


@torch.inference_mode()
def record_inference(model: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record the classification of these images.

    Returns:
        the graph, whose `replay()` classifies whatever lies in the memory of the images by then, and its logits.
    """
    classify, graph = _Logits(model.eval(), dtype), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, and libraries find their memory
            classify(images)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = classify(images)
    return graph, logits
