"""The models compute what the official code computes, and what a slow implementation of the equations does."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_fambav import FambaVForImageClassification, FambaVModel
from support.helpers import (
    images,
    make_model,
    read_fixture,
    slow_match,
    slow_merge,
    tiny_config,
)

CLASS_POSITIONS = ("head", "middle")
ORDERS = ("raster", "appended")


def our_name(official: str) -> str:
    """Name of a parameter of the official state dict in ours."""
    backward = re.sub(r"mixer\.(conv1d|x_proj|dt_proj|A|D)_b\b", r"mixer.backward_scan.\1", official)
    backward = backward.replace("mixer.A_b_log", "mixer.backward_scan.A_log")
    forward = re.sub(r"mixer\.(conv1d|x_proj|dt_proj|A_log|D)\b", r"mixer.forward_scan.\1", backward)
    return {
        "cls_token": "fambav.embeddings.cls_token",
        "pos_embed": "fambav.embeddings.position_embeddings",
        "norm_f.weight": "fambav.norm.weight",
    }.get(forward) or (
        forward.replace("patch_embed.proj", "fambav.embeddings.patch_embeddings.projection")
        .replace("layers.", "fambav.layers.")
        .replace("head.", "classifier.")
    )


@pytest.mark.parametrize("name", ["vim_micro", "fambav_micro_none", "fambav_micro_upper"])
def test_the_official_code_computes_the_same(name):
    golden, metadata = read_fixture(name)
    schedule = json.loads(metadata["fusion_schedule"])
    model = FambaVForImageClassification(
        tiny_config(
            image_size=32,
            patch_size=8,
            num_hidden_layers=4,
            state_size=16,
            num_labels=10,
            cls_token_position=metadata["cls_token_position"],
            fusion_strategy="custom" if sum(schedule) else "none",
            fusion_schedule=schedule if sum(schedule) else None,
            fusion_order="appended",
        )
    )
    assert model.config.sequence_lengths == json.loads(metadata["sequence_lengths"])
    state = {our_name(key.removeprefix("state.")): golden[key] for key in golden if key.startswith("state.")}
    model.load_state_dict(state)

    outputs = model(golden["pixel_values"], labels=golden["labels"])
    torch.testing.assert_close(outputs.logits, golden["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, golden["loss"].squeeze(), rtol=1e-4, atol=1e-4)

    outputs.loss.backward()
    gradients = {our_name(key.removeprefix("grad.")): golden[key] for key in golden if key.startswith("grad.")}
    assert gradients.keys() <= state.keys() and len(gradients) > 10
    for parameter_name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(parameter_name).grad, gradient, rtol=1e-4, atol=1e-4)


def slow_direction(scan, x: Tensor, sizes: Tensor) -> Tensor:
    """One direction of the mixer, for one image x (T, E) in the order of the scan."""
    taps, bias = scan.conv1d.weight.squeeze(1), scan.conv1d.bias
    padded = torch.cat((x.new_zeros(taps.shape[1] - 1, x.shape[1]), x))
    x = F.silu(sum(padded[k : k + len(x)] * taps[:, k] for k in range(taps.shape[1])) + bias)
    rank, state_size = scan.dt_proj.weight.shape[1], scan.A_log.shape[1]
    dt, B, C = scan.x_proj(x).split([rank, state_size, state_size], dim=-1)
    delta = F.softplus(scan.dt_proj(dt)) * sizes.unsqueeze(1)
    A, h, y = -torch.exp(scan.A_log), 0, []
    for t in range(len(x)):
        h = torch.exp(delta[t, :, None] * A) * h + delta[t, :, None] * B[t] * x[t, :, None]
        y.append(h @ C[t] + scan.D * x[t])
    return torch.stack(y)


def slow_model(model: FambaVModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens after the final norm, and the class token, for one image: the design's equations in their order."""
    config = model.config
    rows, columns = config.patch_grid
    projection, side, stride = model.embeddings.patch_embeddings.projection, config.patch_size, config.patch_stride
    patches = []
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            patch = pixels[:, top : top + side, left : left + side]
            patches.append((projection.weight * patch).sum((1, 2, 3)) + projection.bias)
    class_index = 0 if config.cls_token_position == "head" else len(patches) // 2
    tokens = torch.stack([*patches[:class_index], model.embeddings.cls_token[0, 0], *patches[class_index:]])
    residual = tokens + model.embeddings.position_embeddings[0]
    sizes = torch.ones(len(residual), dtype=residual.dtype)

    def norm(layer, hidden_states):
        mean_square = hidden_states.square().mean(-1, keepdim=True)
        return hidden_states / torch.sqrt(mean_square + config.layer_norm_epsilon) * layer.weight

    for layer, r in zip(model.layers, config.tokens_removed):
        normed = norm(layer.norm, residual)
        how = config.fusion_metric, config.fusion_order, config.fusion_window
        _, new_index = slow_match(normed.tolist(), r, class_index, *how)
        weights = sizes.tolist() if config.fusion_reduction == "size_weighted" else [1.0] * len(sizes)
        normed = torch.tensor(slow_merge(normed.tolist(), new_index, weights), dtype=torch.float64)
        residual = torch.tensor(slow_merge(residual.tolist(), new_index, weights), dtype=torch.float64)
        sizes = torch.zeros(len(residual), dtype=torch.float64).index_add(0, torch.tensor(new_index), sizes)
        class_index = new_index[class_index]

        mixer = layer.mixer
        x, z = mixer.in_proj(normed).chunk(2, dim=-1)
        scale = sizes if config.fusion_scale_time_step else torch.ones_like(sizes)
        forward = slow_direction(mixer.forward_scan, x, scale)
        backward = slow_direction(mixer.backward_scan, x.flip(0), scale.flip(0)).flip(0)
        residual = residual + mixer.out_proj((forward + backward) / 2 * F.silu(z))
    tokens = norm(model.norm, residual)
    return tokens, tokens[class_index]


VARIANTS = [
    {"fusion_strategy": "none"},
    {"cls_token_position": "middle", "fusion_strategy": "none"},
    {"fusion_order": "raster"},
    {"fusion_order": "appended"},
    {"cls_token_position": "middle", "fusion_order": "raster"},
    {"cls_token_position": "middle", "fusion_order": "appended"},
    {"fusion_metric": "dot"},
    {"fusion_metric": "euclidean"},
    {"fusion_window": 3, "cls_token_position": "middle"},
    {"fusion_reduction": "size_weighted"},
    {"fusion_scale_time_step": True},
    {"fusion_reduction": "size_weighted", "fusion_scale_time_step": True, "cls_token_position": "middle"},
    # an odd number of patches, 5 x 9
    {"cls_token_position": "middle", "image_size": (12, 20), "patch_stride": 2, "expand": 1, "conv_kernel": 3},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_slow_implementation_computes_the_same(fields):
    model = make_model(**{"fusion_strategy": "all", "fusion_tokens": 4, **fields}).double()
    pixel_values = images(2, model.config).double()
    with torch.no_grad():
        outputs = model(pixel_values)
        for b in range(2):
            tokens, class_token = slow_model(model, pixel_values[b])
            torch.testing.assert_close(outputs.last_hidden_state[b], tokens, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs.pooler_output[b], class_token, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion_tokens": 3},
        {"fusion_strategy": "none"},
        {"fusion_order": "appended"},
        {"fusion_metric": "dot"},
        {"fusion_window": 1},
        {"fusion_reduction": "size_weighted"},
        {"fusion_scale_time_step": True},
        {"fusion_start_layer": 0},
        {"fusion_end_layer": 2},
    ],
    ids=str,
)
def test_fusion_fields_can_be_changed_on_a_trained_model(fields):
    model = make_model(FambaVForImageClassification, fusion_tokens=4)
    before = model(images()).logits
    made_with_them = make_model(FambaVForImageClassification, **{"fusion_tokens": 4, **fields})
    for name, value in fields.items():
        setattr(model.config, name, value)
    outputs = model(images(), output_hidden_states=True)
    assert outputs.hidden_states[-1].shape[1] == model.config.sequence_lengths[-1]
    assert not torch.allclose(outputs.logits, before, rtol=0, atol=1e-5)  # the field is read at all
    assert torch.equal(outputs.logits, made_with_them(images()).logits)


def test_a_changed_copy_leaves_the_model_alone():
    model = make_model()
    duplicate = copy.deepcopy(model)
    duplicate.config.fusion_strategy = "none"
    assert duplicate(images()).last_hidden_state.shape[1] == 17
    assert model(images()).last_hidden_state.shape[1] == 13


def test_a_model_that_would_fuse_nothing_refuses_to_run():
    model = make_model()
    model.config.fusion_tokens = 0
    with pytest.raises(ValueError, match="fusion_tokens=0"):
        model(images())


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_images_do_not_depend_on_each_other(fields):
    model = make_model(**{"fusion_strategy": "all", "fusion_tokens": 3, **fields})
    pixel_values = images(3, model.config)
    together = model(pixel_values, output_token_maps=True)
    for b in range(3):
        alone = model(pixel_values[b : b + 1], output_token_maps=True)
        torch.testing.assert_close(alone.last_hidden_state[0], together.last_hidden_state[b], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.token_maps[-1][0], together.token_maps[-1][b])
