"""Batched Muon against torch's own, and the steps that it must not take."""

import copy

import pytest
import torch
from torch import nn

from fambav_training.run.muon import BatchedMuon
from support.helpers import random_tensor

SHAPES = [(24, 8), (8, 16), (24, 8), (6, 6)]


def matrices() -> list[nn.Parameter]:
    return [nn.Parameter(0.1 * random_tensor(*shape, seed=index)) for index, shape in enumerate(SHAPES)]


def give_gradients(parameters: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    for index, parameter in enumerate(parameters):
        parameter.grad = scale * random_tensor(*parameter.shape, seed=10 * seed + index)


def assert_same(reference: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> None:
    """Matrices and averages of their gradients."""
    for one, other in zip(reference.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        momenta = (part.state[matrix]["momentum_buffer"] for part, matrix in ((reference, one), (optimizer, other)))
        torch.testing.assert_close(*momenta)


def test_steps_are_those_of_torch():
    expected, actual = matrices(), matrices()
    reference = torch.optim.Muon(expected, 0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizer = BatchedMuon(actual, 0.02, weight_decay=0.3)
    for seed in range(4):
        give_gradients(expected, seed)
        give_gradients(actual, seed)
        reference.step()
        optimizer.step()
    assert_same(reference, optimizer)


def test_torch_goes_on_from_its_state():
    parameters, others = matrices(), matrices()
    optimizer = BatchedMuon(parameters, 0.02, weight_decay=0.3)
    give_gradients(parameters, 0)
    optimizer.step()
    reference = torch.optim.Muon(others, 1.0)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other, parameter in zip(others, parameters):
        other.data.copy_(parameter.data)
    for part, group in ((optimizer, parameters), (reference, others)):
        give_gradients(group, 1)
        part.step()
    for other, parameter in zip(others, parameters):
        torch.testing.assert_close(other, parameter, rtol=1e-5, atol=1e-5)


def test_what_has_no_gradient_stays():
    parameters = matrices()
    before = [parameter.detach().clone() for parameter in parameters]
    give_gradients(parameters[:1], 0)
    BatchedMuon(parameters, 0.02, weight_decay=0.3).step()
    changed = [not torch.equal(parameter, old) for parameter, old in zip(parameters, before)]
    assert changed == [True, False, False, False]


def test_scaled_gradients_are_divided():
    expected, actual = matrices(), matrices()
    plain, scaled = (BatchedMuon(parameters, 0.02, 0.0) for parameters in (expected, actual))
    for seed, scale in enumerate((1024.0, 16.0)):
        give_gradients(expected, seed)
        give_gradients(actual, seed, scale)
        scaled.grad_scale = torch.tensor(scale)
        plain.step()
        scaled.step()
    assert_same(plain, scaled)  # their averages too, because the steps alone are the same whatever the scale is


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_a_bad_step_changes_nothing(num_steps_before):
    parameters = matrices()
    optimizer = BatchedMuon(parameters, 0.02, weight_decay=0.3)
    for seed in range(num_steps_before):
        give_gradients(parameters, seed)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    momenta = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).clone() for p in parameters]
    give_gradients(parameters, 9, scale=float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, old, momentum in zip(parameters, before, momenta):
        assert torch.equal(parameter, old) and torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
    optimizer.found_inf = torch.tensor(0.0)
    give_gradients(parameters, 10)
    optimizer.step()
    assert all(
        parameter.isfinite().all() and not torch.equal(parameter, old) for parameter, old in zip(parameters, before)
    )
