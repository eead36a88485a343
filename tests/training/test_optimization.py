"""What is decayed and what is not, and the weight average against its formula."""

import copy

import pytest
import torch
from torch import nn

from helpers import tiny_config
from modeling_fambav import FambaVForImageClassification
from optimization import create_optimizer, create_weight_average

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
