"""What is decayed and what is not, and the weight average against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from fambav_training.run.optimization import MuonWithAdamW, create_optimizer, create_weight_average
from modeling_fambav import FambaVForImageClassification
from support.helpers import random_tensor, tiny_config

# The matrices and filters of the model, written out; everything else is not decayed.
DECAYED = {
    "fambav.embeddings.patch_embeddings.projection.weight",
    "classifier.weight",
    *(f"fambav.layers.{layer}.mixer.{name}.weight" for layer in range(3) for name in ("in_proj", "out_proj")),
    *(
        f"fambav.layers.{layer}.mixer.{direction}_scan.{name}.weight"
        for layer in range(3)
        for direction in ("forward", "backward")
        for name in ("conv1d", "x_proj", "dt_proj")
    ),
}


def parameter_names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(names[id(parameter)] for parameter in parameters)


def test_every_parameter_is_in_the_one_right_group():
    model = FambaVForImageClassification(tiny_config())
    optimizer = create_optimizer(model, learning_rate=0.1, weight_decay=0.3)
    by_decay = {group["weight_decay"]: parameter_names(model, group["params"]) for group in optimizer.param_groups}
    everything = {name for name, _ in model.named_parameters()}
    assert by_decay == {0.3: sorted(DECAYED), 0.0: sorted(everything - DECAYED)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_spared_parameters_stay_where_the_gradient_is_zero():
    model = FambaVForImageClassification(tiny_config())
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    create_optimizer(model, learning_rate=0.1, weight_decay=0.3).step()
    for name, parameter in model.named_parameters():
        expected = 1 - 0.1 * 0.3 if name in DECAYED else 1.0
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, expected), msg=name)


def test_groups_are_the_same_for_a_loaded_model(tmp_path):
    FambaVForImageClassification(tiny_config()).save_pretrained(tmp_path)
    model = FambaVForImageClassification.from_pretrained(tmp_path)
    decayed, _ = create_optimizer(model, learning_rate=0.1, weight_decay=0.3).param_groups
    assert parameter_names(model, decayed["params"]) == sorted(DECAYED)


def test_weight_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    average = create_weight_average(model, decay=0.3)
    # The first update copies; the next keep 2/11 and 3/12 of the average, and from 4/13 > 0.3 on, 0.3 of it.
    for weight, expected in [(1.0, 1.0), (5.0, 47 / 11), (-3.0, -13 / 11), (2.0, 23 / 22), (2.0, 0.3 * 23 / 22 + 1.4)]:
        nn.init.constant_(model.weight, weight)
        average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_weight_average_keeps_the_model_apart():
    model = FambaVForImageClassification(tiny_config())
    before = copy.deepcopy(model.state_dict())
    average = create_weight_average(model, 0.5)
    average.update_parameters(model)
    with torch.no_grad():
        average.module.classifier.weight.fill_(7.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- Muon ----


def muon_parameters(optimizer: MuonWithAdamW) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups if "ns_steps" in group for parameter in group["params"]]


def test_muon_gets_the_matrices_between_tokens_and_adamw_the_rest():
    model = FambaVForImageClassification(tiny_config())
    optimizer = create_optimizer(model, 0.1, 0.3, "muon")
    expected = [f"fambav.layers.{layer}.mixer.{name}.weight" for layer in range(3) for name in ("in_proj", "out_proj")]
    assert parameter_names(model, muon_parameters(optimizer)) == sorted(expected)
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert parameter_names(model, everything) == sorted(name for name, _ in model.named_parameters())
    assert len(everything) == len({id(parameter) for parameter in everything})


def train_three_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=3)
    for step in range(3):
        optimizer.zero_grad()
        model(random_tensor(2, 3, 16, 16, seed=seed + step)).logits.square().sum().backward()
        optimizer.step()
        schedule.step()


def test_muon_steps_are_orthogonal_and_as_large_as_those_of_adamw():
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config())
    optimizer = create_optimizer(model, 0.01, 0.0, "muon")
    weight = model.fambav.layers[0].mixer.in_proj.weight  # (128, 32)
    before = weight.detach().clone()
    weight.grad = 1e-3 * random_tensor(128, 32, seed=0)
    optimizer.step()
    update = (before - weight.detach()) / 0.01
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    singular_values = torch.linalg.svdvals(update) / (0.2 * 128**0.5)
    assert 0.6 < singular_values.min() and singular_values.max() < 1.3  # Newton and Schulz stop there


def test_torchs_scaler_skips_a_step_of_both_parts():
    """As with --mixed_precision fp16."""
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config())
    optimizer, scaler = create_optimizer(model, 0.01, 0.1, "muon"), torch.amp.GradScaler("cpu", init_scale=256.0)
    for is_bad in (False, True, False):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(model(random_tensor(2, 3, 16, 16, seed=0)).logits.square().sum()).backward()
        if is_bad:
            model.classifier.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before)]
        assert not any(changed) if is_bad else sum(changed) > len(changed) / 2
    assert scaler.get_scale() == 128.0


def test_schedule_and_saved_state_reach_both_parts():
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config())
    optimizer = create_optimizer(model, 0.01, 0.1, "muon")
    train_three_steps(model, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    copied = copy.deepcopy(model)
    restored = create_optimizer(copied, 0.5, 0.1, "muon")
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in restored.param_groups} == {0.01}
    for one_model, one_optimizer in ((model, optimizer), (copied, restored)):
        train_three_steps(one_model, one_optimizer, seed=7)
    for (name, expected), parameter in zip(model.named_parameters(), copied.parameters()):
        assert torch.equal(parameter, expected), name
