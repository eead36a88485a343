"""The forward and the backward pass of a training step as CUDA graphs: a launch each, instead of a thousand.

A small model is done with a kernel before the program has asked for the next one. Recorded once, a whole pass is
asked for at once, and computes the same.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fambav_training.run.arguments import TrainingArguments


def check_cuda_graphs(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse to record where there is no GPU, or where two passes have not the same shapes and weights.

    Raises:
        ValueError: if it is so.
    """
    if not args.cuda_graphs:
        return
    if accelerator.device.type != "cuda":
        raise ValueError(f"--cuda_graphs: expected a CUDA device, this run is on {accelerator.device.type!r}")
    if accelerator.num_processes > 1:
        raise ValueError(f"--cuda_graphs: expected one process, there are {accelerator.num_processes}")
    steps = args.gradient_accumulation_steps
    if steps > 1:  # a replay writes over the gradients of the one before
        raise ValueError(f"--cuda_graphs: expected --gradient_accumulation_steps 1, not {steps}")
    if args.streaming:
        raise ValueError("--cuda_graphs: expected no --streaming, whose last batch is smaller than the others")


class _Logits(nn.Module):
    """A classifier from tensor to tensor, as graphs need it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def record(model: nn.Module, batch_size: int, image_size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Record a classifier in training mode; nothing of it changes, nor do random numbers.

    Returns:
        images `(batch_size, 3, H, W)` in float32 to logits `(batch_size, classes)`, with gradients of the weights.
        Both passes use memory of their own: what they give must be used before the next call.
    """
    device = next(model.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.randn(batch_size, 3, *image_size, device=device)
        graphed = torch.cuda.make_graphed_callables(_Logits(model), (images,))
    with torch.no_grad():
        for buffer, before in buffers:  # statistics of batch norm, which have seen those images
            buffer.copy_(before)
    return graphed
