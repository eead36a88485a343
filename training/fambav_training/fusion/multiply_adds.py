"""Multiply-adds of a forward pass: what a model costs on any machine, before anybody measures it."""

import torch
from torch import nn

from fambav_training.fusion.settings import UNFUSED, with_fusion
from modeling_fambav import FambaVConfig
from modeling_fambav.embeddings import FambaVEmbeddings

# Of a state in one step of the scan: decay times state, time step times B, and state times C
_OF_A_STATE = 3


def multiply_adds(config: FambaVConfig) -> int:
    """Multiply-adds of one image through the model, without its classifier.

    Counted are the stem or the projection of the patches, all products and convolutions of the mixers, the scans and,
    in layers that fuse, the similarities of the tokens that `fusion_window` lets compare. The kernels compute whole
    blocks of those, and plain torch, mamba-ssm and ONNX the similarities of all tokens. Not counted: operations that
    touch each value once (norms, activations, exponentials, gates and the averages of the tokens).
    """
    tokens_before = [config.num_patches + 1, *config.sequence_lengths[:-1]]
    total = _of_embeddings(config)
    for before, after in zip(tokens_before, config.sequence_lengths):
        total += after * _of_a_token(config)
        if after < before:
            total += _pairs(before, config.fusion_window) * config.hidden_size
    return total


def multiply_add_share(config: FambaVConfig) -> float:
    """Multiply-adds of a configuration as a share of those that it has without fusion."""
    return multiply_adds(config) / multiply_adds(with_fusion(config, UNFUSED))


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of an even and an odd token that are at most `window` places apart, or all pairs if it is None."""
    reach = tokens if window is None else window
    pairs = 0
    for i in range((tokens + 1) // 2):
        first_odd, end = max(0, i - (reach + 1) // 2), min(tokens // 2, i + (reach - 1) // 2 + 1)
        pairs += end - first_odd
    return pairs


def _of_a_token(config: FambaVConfig) -> int:
    """In one layer: both projections, and both directions of convolution, x_proj, dt_proj and scan."""
    width, channels, states = config.hidden_size, config.intermediate_size, config.state_size
    rank = int(config.time_step_rank)
    direction = channels * (config.conv_kernel + rank + 2 * states + rank + _OF_A_STATE * states)
    return width * 2 * channels + 2 * direction + channels * width


def _of_embeddings(config: FambaVConfig) -> int:
    """Of the convolutions, whose outputs' shapes come from a pass without data."""
    counts = []

    def count(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        counts.append(output[0].numel() * module.weight[0].numel())

    with torch.device("meta"):
        embeddings = FambaVEmbeddings(config)
        for module in embeddings.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        embeddings(torch.zeros(1, config.num_channels, *config.image_height_width))
    return sum(counts)
