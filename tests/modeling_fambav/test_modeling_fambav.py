"""The models: outputs of the contract, fusion at work, parity with the official code and a slow implementation."""

import copy
import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVConfig, FambaVForImageClassification, FambaVModel, backends, unmerge
from modeling_fambav.modeling_fambav import FambaVDropPath
from support.helpers import random_tensor, read_fixture, slow_match, slow_merge, tiny_config, tolerance

CLASS_POSITIONS = ("head", "middle")
ORDERS = ("raster", "appended")


def images(batch_size: int = 3, config: FambaVConfig | None = None, seed: int = 0) -> Tensor:
    config = config or tiny_config()
    return random_tensor(batch_size, config.num_channels, *config.image_height_width, seed=seed)


def make_model(model_class=FambaVModel, **fields):
    """A tiny model whose every parameter matters: none is zero, one, or very small."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("norm.weight"):  # otherwise all normed tokens have about the same length
                parameter.mul_(torch.randn_like(parameter).exp())
    return model


# ---- outputs of the contract ----


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_model_outputs(position):
    model = make_model(cls_token_position=position)
    outputs = model(images())
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert outputs.last_hidden_state.shape == (3, 13, 32)  # 17 tokens less two in each of the last two layers
    assert outputs.pooler_output.shape == (3, 32)
    assert outputs.hidden_states is None and outputs.token_maps is None

    last_hidden_state, pooler_output = model(images(), return_dict=False)
    assert torch.equal(last_hidden_state, outputs.last_hidden_state)
    assert torch.equal(pooler_output, outputs.pooler_output)


def test_classifier_outputs():
    model = make_model(FambaVForImageClassification, num_labels=7)
    labels = torch.tensor([0, 6, 3])
    outputs = model(pixel_values=images(), labels=labels)
    assert isinstance(outputs, ImageClassifierOutput)
    assert outputs.logits.shape == (3, 7)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(outputs.logits, model.classifier(model.fambav(images()).pooler_output))
    assert outputs.hidden_states is None and outputs.token_maps is None
    assert model(images()).loss is None

    loss, logits = model(images(), labels=labels, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)


def test_classifier_without_labels_returns_the_class_token():
    model = make_model(FambaVForImageClassification, num_labels=0)
    assert torch.equal(model(images()).logits, model.fambav(images()).pooler_output)


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
def test_hidden_states(model_class):
    model = make_model(model_class)
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    assert [states.shape for states in hidden_states] == [(3, length, 32) for length in (17, 17, 15, 13)]
    base = model if model_class is FambaVModel else model.fambav
    assert torch.equal(hidden_states[0], base.embeddings(images())[0])
    assert torch.equal(base.norm(hidden_states[-1]), base(images()).last_hidden_state)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_token_maps(position, order):
    model = make_model(cls_token_position=position, fusion_order=order, num_hidden_layers=4, fusion_tokens=3)
    outputs = model(images(), output_token_maps=True)
    lengths = [17, 14, 11, 8]
    assert model.config.sequence_lengths == lengths
    assert isinstance(outputs.token_maps, tuple) and len(outputs.token_maps) == 4
    for token_map, length in zip(outputs.token_maps, lengths):
        assert token_map.dtype == torch.int64 and token_map.shape == (3, 17)
        assert all(set(image.tolist()) == set(range(length)) for image in token_map)
    assert torch.equal(outputs.token_maps[0], torch.arange(17).expand(3, -1))

    # Tokens once fused stay together.
    for token_map, later in zip(outputs.token_maps, outputs.token_maps[1:]):
        together = token_map.unsqueeze(1) == token_map.unsqueeze(2)
        assert (later.unsqueeze(1) == later.unsqueeze(2))[together].all()

    # The class token carries itself alone, and stands where the pooler output is read.
    last_map = outputs.token_maps[-1]
    class_place = last_map[:, 0 if position == "head" else 8]
    assert torch.equal(outputs.last_hidden_state[torch.arange(3), class_place], outputs.pooler_output)
    assert (last_map == class_place.unsqueeze(1)).sum(1).tolist() == [1, 1, 1]
    if order == "appended":
        assert class_place.tolist() == [0, 0, 0]

    dense = unmerge(outputs.last_hidden_state, last_map)
    assert dense.shape == (3, 17, 32)
    for b in range(3):
        assert torch.equal(dense[b], outputs.last_hidden_state[b, last_map[b]])

    classifier = FambaVForImageClassification(model.config)
    classifier.fambav = model
    for token_map, expected in zip(classifier(images(), output_token_maps=True).token_maps, outputs.token_maps):
        assert torch.equal(token_map, expected)


def test_asking_for_more_outputs_changes_nothing():
    model = make_model(cls_token_position="middle")
    plain = model(images()).last_hidden_state
    assert torch.equal(model(images(), output_token_maps=True, output_hidden_states=True).last_hidden_state, plain)


# ---- parity ----


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
        _, new_index = slow_match(normed.tolist(), r, class_index, config.fusion_metric, config.fusion_order)
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


# ---- images of all kinds ----


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_images_do_not_depend_on_each_other(fields):
    model = make_model(**{"fusion_strategy": "all", "fusion_tokens": 3, **fields})
    pixel_values = images(3, model.config)
    together = model(pixel_values, output_token_maps=True)
    for b in range(3):
        alone = model(pixel_values[b : b + 1], output_token_maps=True)
        torch.testing.assert_close(alone.last_hidden_state[0], together.last_hidden_state[b], rtol=1e-4, atol=1e-5)
        assert torch.equal(alone.token_maps[-1][0], together.token_maps[-1][b])


@pytest.mark.parametrize("position", CLASS_POSITIONS)
@pytest.mark.parametrize(
    "fields, lengths",
    [
        ({"image_size": (16, 32)}, [33, 31, 29]),
        ({"image_size": (32, 16), "patch_stride": 2}, [106, 104, 102]),
        ({"num_channels": 1}, [17, 15, 13]),
        ({"image_size": 20}, [26, 24, 22]),  # 5 x 5 patches
        ({"image_size": (4, 12)}, [4, 3, 2]),  # three patches
        ({"image_size": (4, 8)}, [3, 2, 2]),  # two patches
        ({"image_size": 4, "fusion_strategy": "none"}, [2, 2, 2]),  # one patch
        ({"fusion_tokens": 10**9, "fusion_strategy": "all"}, [9, 5, 3]),
        ({"hidden_size": 20, "conv_kernel": 1, "state_size": 1, "expand": 1}, [17, 15, 13]),
        ({"num_hidden_layers": 1}, [15]),
    ],
    ids=str,
)
def test_geometries(fields, lengths, position):
    model = make_model(FambaVForImageClassification, cls_token_position=position, **fields)
    assert model.config.sequence_lengths == lengths
    for batch_size in (1, 2):
        outputs = model(images(batch_size, model.config), output_hidden_states=True)
        assert [states.shape[1] for states in outputs.hidden_states[1:]] == lengths
        assert outputs.logits.shape == (batch_size, 2) and outputs.logits.isfinite().all()
    outputs.logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.fambav.embeddings.patch_embeddings.projection.weight.grad.any()


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_images_of_another_size(position):
    model = make_model(cls_token_position=position)
    outputs = model(random_tensor(2, 3, 24, 20, seed=0), interpolate_pos_encoding=True, output_token_maps=True)
    assert outputs.token_maps[0].shape == (2, 31)
    assert outputs.last_hidden_state.shape == (2, 27, 32)
    class_place = outputs.token_maps[-1][:, 0 if position == "head" else 15]
    assert torch.equal(outputs.last_hidden_state[torch.arange(2), class_place], outputs.pooler_output)

    same_size = model(images(), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(same_size, model(images()).last_hidden_state)


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_position_embeddings_are_interpolated_by_row_and_column(position):
    embeddings = make_model(image_size=(16, 24), cls_token_position=position).embeddings
    for parameter in embeddings.parameters():
        parameter.data.zero_()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    patches = torch.stack((rows, columns), dim=-1).flatten(0, 1)
    middle = 0 if position == "head" else 12
    positions = embeddings.position_embeddings.data[0]
    positions[middle] = 7
    positions[torch.arange(25) != middle, :2] = patches

    tokens, class_index = embeddings(torch.zeros(1, 3, 32, 48), interpolate_pos_encoding=True)
    assert class_index == (0 if position == "head" else 48)
    assert (tokens[0, class_index] == 7).all()
    grid = tokens[0, torch.arange(97) != class_index].unflatten(0, (8, 12))
    # Patch i of twice as many is at i/2 - 1/4 of the original grid; away from the border a ramp nearly stays a ramp.
    torch.testing.assert_close(grid[3:5, 0, 0], torch.tensor([1.25, 1.75]), rtol=0, atol=0.06)
    torch.testing.assert_close(grid[0, 4:8, 1], torch.tensor([1.75, 2.25, 2.75, 3.25]), rtol=0, atol=0.06)
    torch.testing.assert_close(grid[:, 0, 0], grid[:, 11, 0])
    torch.testing.assert_close(grid[0, :, 1], grid[7, :, 1])


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((1, 3, 20, 16), {}, r"20 x 16 pixels: expected image_size=16, or interpolate_pos_encoding=True"),
        ((1, 3, 16, 3), {"interpolate_pos_encoding": True}, r"16 x 3 pixels: expected at least patch_size=4"),
        ((1, 4, 16, 16), {}, r"\(1, 4, 16, 16\): expected \(batch, num_channels=3, height, width\)"),
        ((3, 16, 16), {}, r"\(3, 16, 16\): expected \(batch, num_channels=3, height, width\)"),
    ],
)
def test_wrong_images(model_class, shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(model_class)(torch.zeros(shape), **arguments)


def test_height_and_width_are_not_interchangeable():
    with pytest.raises(ValueError, match=r"32 x 16 pixels: expected image_size=\(16, 32\)"):
        make_model(image_size=(16, 32))(torch.zeros(1, 3, 32, 16))


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
def test_missing_pixel_values(model_class):
    with pytest.raises(ValueError, match="pixel_values is missing"):
        make_model(model_class)()


# ---- precision ----


@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_bfloat16(mode, position):
    model = make_model(FambaVForImageClassification, cls_token_position=position, fusion_strategy="none")
    expected = model(images())
    if mode == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        outputs = model(images(), output_hidden_states=True, labels=torch.tensor([0, 1, 1]))
        assert outputs.logits.dtype == torch.bfloat16
        assert {states.dtype for states in outputs.hidden_states} == {torch.float32}  # the residual stream
        torch.testing.assert_close(outputs.logits.float(), expected.logits, **tolerance("scan", torch.bfloat16))

        # A rounded similarity may choose another partner, so with fusion there is nothing to compare.
        model.config.fusion_strategy = "all"
        outputs = model(images(), output_hidden_states=True, labels=torch.tensor([0, 1, 1]))
    assert outputs.hidden_states[-1].shape[1] == 11 and outputs.logits.isfinite().all()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_residual_in_the_dtype_of_the_weights():
    model = make_model(residual_in_fp32=False).bfloat16()
    outputs = model(images(), output_hidden_states=True)
    assert {states.dtype for states in outputs.hidden_states} == {torch.bfloat16}
    assert outputs.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_skips_and_time_steps_stay_float32(dtype, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_chosen", backend)
    exact = make_model(FambaVForImageClassification, fusion_strategy="none")
    exact.save_pretrained(tmp_path / "float32")
    for source, target in (("float32", "half"), ("half", "again")):  # what was saved in half precision as well
        model = FambaVForImageClassification.from_pretrained(tmp_path / source, dtype=dtype)
        model.save_pretrained(tmp_path / target)
        expected = exact.state_dict()
        for name, parameter in model.named_parameters():
            is_kept = re.search(r"_scan\.(A_log|D|dt_proj\.bias)$", name) is not None
            assert parameter.dtype == (torch.float32 if is_kept else dtype), name
            assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
    logits = model(images().to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact(images()).logits, **tolerance("scan", torch.bfloat16))
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}  # as the docstring says


# ---- training ----


def gradients(model, pixel_values: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(pixel_values, labels=torch.zeros(len(pixel_values), dtype=torch.long)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_gradient_checkpointing_gives_the_same_gradients(position, use_reentrant):
    model = make_model(
        FambaVForImageClassification,
        cls_token_position=position,
        fusion_reduction="size_weighted",
        fusion_scale_time_step=True,
        drop_path_rate=0.3,
    ).train()
    expected = gradients(model, images())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model, images())
    assert expected.keys() == checkpointed.keys()
    assert expected["fambav.embeddings.cls_token"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda message: f"{name}: {message}")


def test_drop_path():
    drop_path = FambaVDropPath(0.25)
    tokens = random_tensor(4000, 2, 3, seed=0) + 1
    assert torch.equal(drop_path.eval()(tokens), tokens)
    torch.manual_seed(0)
    dropped = drop_path.train()(tokens)
    kept = (dropped != 0).flatten(1).any(1)
    torch.testing.assert_close(dropped[kept], tokens[kept] / 0.75)  # whole samples, the others are zero
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped.mean(0), tokens.mean(0), rtol=0, atol=0.05)


def test_drop_path_rises_linearly_and_acts_in_training_only():
    model = make_model(num_hidden_layers=5, drop_path_rate=0.4)
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    without = make_model(num_hidden_layers=5)
    assert torch.equal(model(images()).last_hidden_state, without(images()).last_hidden_state)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images()).last_hidden_state, without(images()).last_hidden_state)


def test_dropout_acts_in_training_only():
    model = make_model(hidden_dropout_prob=0.5)
    expected = make_model()(images()).last_hidden_state
    assert torch.equal(model(images()).last_hidden_state, expected)
    assert not torch.allclose(model.train()(images()).last_hidden_state, expected)


def test_trainer_trains_and_saves(tmp_path):
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(num_labels=3, cls_token_position="middle"))
    before = copy.deepcopy(model.state_dict())
    examples = [{"pixel_values": images(1, seed=i)[0], "labels": i % 3} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples)
    assert trainer.train().global_step == 2
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(examples).predictions.shape == (4, 3)

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(loaded) is FambaVForImageClassification
    assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)


# ---- initial weights ----


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


# ---- torch.compile ----


def compiled_gradients(backend: str, **fields) -> None:
    model = make_model(FambaVForImageClassification, fusion_strategy="all", num_hidden_layers=2, **fields)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)
    expected = gradients(model, images())
    for name, gradient in gradients(compiled, images()).items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("order", [pytest.param("raster", marks=pytest.mark.slow), "appended"])
@pytest.mark.parametrize("position", [pytest.param("head", marks=pytest.mark.slow), "middle"])
def test_the_whole_model_is_one_graph(position, order):
    compiled_gradients(
        "aot_eager",
        cls_token_position=position,
        fusion_order=order,
        fusion_reduction="size_weighted",
        fusion_scale_time_step=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_model_equals_eager_model():
    # 20 channels are not a whole number of the kernels' vectors, so outputs may have other strides than expected.
    compiled_gradients("inductor", cls_token_position="middle", hidden_size=20, expand=1)


# ---- Auto classes, saved folders ----


def test_auto_classes():
    assert type(AutoConfig.for_model("fambav", fusion_tokens=4)) is FambaVConfig
    config = tiny_config(num_labels=5)
    assert type(AutoModel.from_config(config)) is FambaVModel
    classifier = AutoModelForImageClassification.from_config(config)
    assert type(classifier) is FambaVForImageClassification and classifier.classifier.out_features == 5


def test_saved_folder(tmp_path):
    model = make_model(FambaVForImageClassification, num_labels=5, fusion_strategy="custom", fusion_schedule=[0, 3, 1])
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTImageProcessorPil)
    assert AutoConfig.from_pretrained(tmp_path).tokens_removed == [0, 3, 1]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is FambaVModel
    assert torch.equal(base(images()).pooler_output, model.fambav(images()).pooler_output)


def test_fusion_fields_can_be_given_while_loading(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, fusion_strategy="all", fusion_tokens=3)
    assert loaded(images()).last_hidden_state.shape[1] == 17 - 3 * 3
