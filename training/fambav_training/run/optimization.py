"""Optimizer, schedule and weight average of the recipe: AdamW (0.9, 0.999), decay only where Vim decays, and an EMA.

Muon, which the paper does not use, is the other choice for the large matrices of the layers. A step that must not be
taken is skipped by the device itself (`step_unless`), so that the program need not wait for the loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from transformers import get_scheduler

from fambav_training.run.muon import BatchedMuon
from modeling_fambav import FambaVPreTrainedModel

# The matrices that map tokens to tokens, nearly all of the weights
_OF_MUON = ("in_proj.weight", "out_proj.weight")
OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with the groups of both.

    Both take one learning rate. Both heed `grad_scale` and `found_inf`, see `BatchedMuon`.
    """

    _step_supports_amp_scaling = True  # by which torch's GradScaler knows
    found_inf: Tensor | None = None

    def __init__(self, muon: BatchedMuon, adamw: torch.optim.AdamW):
        self._parts = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        # The very dictionaries of the two, so that a schedule reaches them
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both. `closure` computes the loss anew."""
        muon, adamw = self._parts
        for part in self._parts:
            # torch's GradScaler multiplies the former by its own, so it must not be there before
            part.grad_scale, part.found_inf = getattr(self, "grad_scale", None), self.found_inf
        loss = muon.step(closure)
        adamw.step()
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


@torch.no_grad()
def step_unless(optimizer: AcceleratedOptimizer, is_bad: Tensor) -> None:
    """One step, or none if `is_bad` holds: a boolean tensor on the device, whose value the host never waits for.

    With float16, the gradients' scaler takes no step and halves its scale, as at an overflow.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is None:
        inner.found_inf = is_bad.float()
        optimizer.step()
        inner.found_inf = None
        return
    # The scaler looks at gradients, and those of an infinite loss may be finite
    gradient = next(p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None)
    gradient.masked_fill_(is_bad, torch.nan)
    optimizer.step()


def create_schedule(
    optimizer: torch.optim.Optimizer | AcceleratedOptimizer, name: str, warmup_ratio: float, num_steps: int
) -> LambdaLR:
    """The learning rate of each of `num_steps` steps: linear warm-up in this share of them, then `name`'s own way.

    It counts optimizer steps, so it is not for `accelerator.prepare`, which steps a schedule once per process.
    """
    return get_scheduler(name, optimizer, round(warmup_ratio * num_steps), num_steps)


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
    return MuonWithAdamW(BatchedMuon(of_muon, learning_rate, weight_decay), adamw)


class WeightAverage(AveragedModel):
    """Exponential moving average of the weights of a model, in `module`.

    The decay is at most (1 + n) / (10 + n) at update n, so that the average forgets the initial weights also in
    short runs. The number of updates stays on the host: torch's own update copies it to the device and back.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the present weights in; the first ones are taken as they are."""
        num_updates = int(self.n_averaged)
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates)) if num_updates else 0.0
        averaged, current = (list(module.parameters()) for module in (self.module, model))
        if decay == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - decay)
        for own, other in zip(self.module.buffers(), model.buffers()):
            own.copy_(other)
        self.n_averaged += 1


def create_weight_average(model: nn.Module, decay: float) -> WeightAverage:
    """Exponential moving average of the weights, with at most this decay."""
    return WeightAverage(model, decay)
