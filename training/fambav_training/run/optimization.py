"""Optimizer and weight average of the recipe: AdamW (0.9, 0.999), decay only where Vim decays, and an EMA.

Muon, which the paper does not use, is the other choice for the large matrices of the layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from modeling_fambav import FambaVPreTrainedModel

# The matrices that map tokens to tokens, nearly all of the weights
_OF_MUON = ("in_proj.weight", "out_proj.weight")
OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with the groups of both.

    Muon orthogonalises the update of a matrix (Jordan et al., 2024, kellerjordan.github.io/posts/muon). Its step is
    scaled to the size of AdamW's (Liu et al., 2025, arXiv:2502.16982), so that both take one learning rate.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self._parts = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        # The very dictionaries of the two, so that a schedule reaches them
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both. `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of the two, by name."""
        return dict(zip(("muon", "adamw"), (part.state_dict() for part in self._parts)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` has given."""
        for part, name in zip(self._parts, ("muon", "adamw")):
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def create_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, name: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW with the weight decay where the model has it, or Muon beside it (`name`, one of `OPTIMIZERS`)."""
    decays = set(FambaVPreTrainedModel.decayed_parameters(model))  # also for a model around one of ours
    decayed, not_decayed, of_muon = [], [], []
    for parameter_name, parameter in model.named_parameters():
        if name == "muon" and parameter_name.endswith(_OF_MUON):
            of_muon.append(parameter)
        else:
            (decayed if parameter_name in decays else not_decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), fused=True)
    if name == "adamw":
        return adamw
    muon = torch.optim.Muon(of_muon, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


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
