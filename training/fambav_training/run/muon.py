"""Muon for many small matrices: all of one shape together, in a few launches instead of dozens for each."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, whose state and steps it has, with Nesterov momentum, scaled to AdamW's size (arXiv:2502.16982).

    As torch's fused optimizers, it divides the gradients by the attribute `grad_scale` and takes no step where
    `found_inf` is 1, if somebody has set them; both are tensors on the device of the parameters, and nobody waits for
    their values.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all matrices. `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                self._step(matrices, group)
        return loss

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradient = torch.stack([matrix.grad for matrix in matrices])
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        momentum = torch.stack(buffers)
        if self.found_inf is not None:  # then the average stays, whatever the gradient is
            gradient = torch.where(self.found_inf != 0, momentum, gradient)
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        update = gradient.lerp(momentum, group["momentum"])
        update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        size = 0.2 * max(update.shape[1:]) ** 0.5
        change = -group["lr"] * (size * update.to(gradient.dtype) + group["weight_decay"] * torch.stack(matrices))
        if self.found_inf is not None:
            change = torch.where(self.found_inf != 0, 0.0, change)
        torch._foreach_add_(matrices, list(change.unbind()))


def _by_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those that have a gradient, in groups of one shape."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    for _, matrices in groupby(sorted(with_gradient, key=lambda p: p.shape), key=lambda p: p.shape):
        yield list(matrices)


def _orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices `(n, a, b)` with singular values of about 1 and the same singular vectors, by Newton-Schulz steps.

    In bfloat16 (Jordan et al., 2024, kellerjordan.github.io/posts/muon).
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
