"""Initial weights: distributions of Mamba and Vim, the sizes of the paper, and a start that a deep model survives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_fambav import FambaVConfig, FambaVForImageClassification, FambaVModel
from support.helpers import gradients, images, make_model, tiny_config


def assert_uniform(tensor: Tensor, bound: float) -> None:
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.95 * bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def assert_normal(tensor: Tensor, std: float) -> None:
    assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel())
    assert tensor.std().item() == pytest.approx(std, rel=0.05)


def test_the_initial_patch_projection_is_lecun_normal():
    torch.manual_seed(0)
    model = FambaVModel(tiny_config(hidden_size=256))
    assert_normal(model.embeddings.patch_embeddings.projection.weight, 1 / math.sqrt(3 * 4 * 4))  # 1 / sqrt(fan in)


def test_initial_weights():
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, state_size=16, num_hidden_layers=4, num_labels=50)
    model = FambaVForImageClassification(config)
    embeddings = model.fambav.embeddings
    projection = embeddings.patch_embeddings.projection
    assert_normal(embeddings.position_embeddings, 0.02)
    assert_normal(model.classifier.weight, 0.02)
    assert embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.25)  # of only 128 numbers
    assert not projection.bias.any() and not model.classifier.bias.any()
    assert (model.fambav.norm.weight == 1).all()
    for layer in model.fambav.layers:
        assert (layer.norm.weight == 1).all()
        assert_uniform(layer.mixer.in_proj.weight, 1 / math.sqrt(128))
        assert_uniform(layer.mixer.out_proj.weight, 1 / math.sqrt(256) / math.sqrt(4))
        for scan in (layer.mixer.forward_scan, layer.mixer.backward_scan):
            torch.testing.assert_close(scan.A_log, torch.log(torch.arange(1.0, 17)).expand(256, 16))
            assert (scan.D == 1).all()
            assert_uniform(scan.conv1d.weight, 1 / math.sqrt(4))
            assert_uniform(scan.x_proj.weight, 1 / math.sqrt(256))
            assert_uniform(scan.dt_proj.weight, 8**-0.5)
            time_step = F.softplus(scan.dt_proj.bias)
            assert 0.001 * 0.999 <= time_step.min() < 0.0012 and 0.08 < time_step.max() <= 0.1 * 1.001
            assert time_step.log10().mean().item() == pytest.approx(-2, abs=0.12)  # log-uniform
            assert not scan.conv1d.bias.any()
    forward, backward = model.fambav.layers[0].mixer.forward_scan, model.fambav.layers[1].mixer.forward_scan
    assert not torch.equal(forward.dt_proj.bias, backward.dt_proj.bias)


def test_initial_time_steps_are_floored():
    model = FambaVModel(tiny_config(time_step_min=1e-6, time_step_max=0.2, time_step_floor=0.01))
    time_step = F.softplus(model.layers[0].mixer.forward_scan.dt_proj.bias)
    assert time_step.min().item() == pytest.approx(0.01, rel=1e-3)
    assert time_step.max() < 0.21


@pytest.mark.parametrize("name, millions", [("vim-ti", 7.1), ("vim-s", 25.8), ("vim-b", 97.6)])
def test_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = FambaVForImageClassification(FambaVConfig.from_preset(name, num_labels=1000))
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_a_deep_model_starts_with_signals_and_gradients_of_ordinary_size():
    model = make_model(FambaVForImageClassification, num_hidden_layers=96, fusion_tokens=1)
    logits = model(images()).logits
    assert logits.std() < 1
    norms = [norm.item() for name, gradient in gradients(model, images()).items() if (norm := gradient.norm()) > 0]
    assert max(norms) < 100
