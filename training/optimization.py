"""Optimizer and weight average of the recipe: AdamW (0.9, 0.999), decay only where Vim decays, and an EMA."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

# Parameters of more than one dimension that are still not decayed; biases, norms and D have one dimension.
_NO_DECAY = ("A_log", "cls_token", "position_embeddings")


def create_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and filters only.

    Parameters are told apart by name and shape, because marks on the tensors are lost when a model is loaded.
    """
    decayed, not_decayed = [], []
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in _NO_DECAY
        (not_decayed if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999))


def create_weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights.

    The decay is at most (1 + n) / (10 + n) at update n, so that the average forgets the initial weights also in
    short runs.
    """

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_updates: Tensor | int) -> None:
        num_updates = int(num_updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + num_updates) / (10 + num_updates)))

    return AveragedModel(model, multi_avg_fn=update)
