"""FambaVBackbone: maps against the tokens they come from, stages, heads of transformers on it, saved folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)
from transformers.modeling_outputs import BackboneOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVBackbone, FambaVConfig, FambaVForImageClassification, FambaVModel
from support.child_process import REPOSITORY, run_python
from support.helpers import random_tensor, tiny_config
from support.hub_server import Commit, HubServer, Repository

CLASS_POSITIONS = ("head", "middle")
ORDERS = ("raster", "appended")
ALL_STAGES = ["stem", "stage1", "stage2", "stage3"]


def make_backbone(**fields) -> FambaVBackbone:
    """A tiny backbone away from its initial weights; by default it returns every stage."""
    torch.manual_seed(0)
    model = FambaVBackbone(tiny_config(**{"out_features": ALL_STAGES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch_size: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return random_tensor(batch_size, 3, height, width, seed=0)


# ---- maps ----


@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_maps_without_fusion_are_the_hidden_states(position):
    backbone = make_backbone(cls_token_position=position, fusion_strategy="none", image_size=(16, 24))
    outputs = backbone(images(width=24))
    assert isinstance(outputs, BackboneOutput) and isinstance(outputs.feature_maps, tuple)
    hidden_states = backbone.fambav(images(width=24), output_hidden_states=True).hidden_states
    assert len(outputs.feature_maps) == len(hidden_states) == 4
    is_patch = torch.arange(25) != (0 if position == "head" else 12)
    for feature_map, states in zip(outputs.feature_maps, hidden_states):
        expected = states[:, is_patch].reshape(2, 4, 6, 32).permute(0, 3, 1, 2)
        assert torch.equal(feature_map, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_maps_give_every_patch_the_token_that_carries_it(position, order):
    backbone = make_backbone(
        cls_token_position=position, fusion_order=order, fusion_strategy="all", fusion_tokens=4, image_size=(12, 24)
    )
    feature_maps = backbone(images(2, 12, 24)).feature_maps
    outputs = backbone.fambav(images(2, 12, 24), output_hidden_states=True, output_token_maps=True)
    class_index = 0 if position == "head" else 9
    for stage, feature_map in enumerate(feature_maps):
        assert feature_map.shape == (2, 32, 3, 6)
        assert outputs.hidden_states[stage].shape[1] == 19 - 4 * stage
        for b in range(2):
            for patch in range(18):
                token = patch if patch < class_index else patch + 1
                carrier = token if stage == 0 else outputs.token_maps[stage - 1][b, token]
                expected = outputs.hidden_states[stage][b, carrier]
                assert torch.equal(feature_map[b, :, patch // 6, patch % 6], expected)
    assert len(torch.unique(feature_maps[-1][0].flatten(1), dim=1).T) == 6  # as many values as patch tokens are left


@pytest.mark.parametrize("position", CLASS_POSITIONS)
@pytest.mark.parametrize(
    "fields, size, grid",
    [
        ({"image_size": (16, 32)}, (16, 32), (4, 8)),
        ({"image_size": (20, 12)}, (20, 12), (5, 3)),  # an odd number of patches
        ({"image_size": 16, "patch_stride": 2}, (16, 16), (7, 7)),
        ({}, (24, 20), (6, 5)),  # not image_size
        ({}, (19, 33), (4, 8)),  # patches do not cover it
        ({"image_size": (4, 8)}, (4, 8), (1, 2)),
    ],
)
def test_shapes(fields, size, grid, position):
    backbone = make_backbone(cls_token_position=position, **fields)
    assert backbone.config.patch_grid_of(*size) == grid
    outputs = backbone(images(2, *size))
    assert [feature_map.shape for feature_map in outputs.feature_maps] == [(2, 32, *grid)] * 4
    assert all(feature_map.isfinite().all() for feature_map in outputs.feature_maps)


def test_images_of_another_size_can_be_refused():
    with pytest.raises(ValueError, match="20 x 16 pixels: expected image_size=16"):
        make_backbone()(images(1, 20, 16), interpolate_pos_encoding=False)


def test_missing_pixel_values():
    with pytest.raises(ValueError, match="pixel_values is missing"):
        make_backbone()()


def test_hidden_states_only_if_asked_for():
    backbone = make_backbone()
    assert backbone(images()).hidden_states is None
    hidden_states = backbone(images(), output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in hidden_states] == [17, 17, 15, 13]
    (feature_maps,) = backbone(images(), return_dict=False)
    assert torch.equal(feature_maps[-1], backbone(images()).feature_maps[-1])


def test_maps_have_the_dtype_of_the_weights():
    # The residual stream is kept in float32, but the convolution of a head is not.
    feature_maps = make_backbone().bfloat16()(images()).feature_maps
    assert {feature_map.dtype for feature_map in feature_maps} == {torch.bfloat16}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", CLASS_POSITIONS)
def test_gradients_reach_every_parameter(position, order):
    backbone = make_backbone(
        cls_token_position=position, fusion_order=order, fusion_strategy="all", out_features=["stage3"]
    )
    (feature_map,) = backbone.train()(images()).feature_maps
    (feature_map * random_tensor(*feature_map.shape, seed=1)).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_fusion_fields_can_be_changed_on_a_trained_backbone():
    backbone = make_backbone()
    fused = backbone(images()).feature_maps[-1]
    backbone.config.fusion_strategy = "none"
    unfused = backbone(images()).feature_maps[-1]
    assert unfused.shape == fused.shape and not torch.allclose(unfused, fused)


# ---- stages ----


def test_the_last_stage_is_the_default():
    config = tiny_config()
    assert config.stage_names == ALL_STAGES
    assert (config.out_features, config.out_indices) == (["stage3"], [3])
    backbone = FambaVBackbone(config)
    assert (backbone.out_features, backbone.out_indices, backbone.channels) == (["stage3"], [3], [32])
    assert len(backbone(images()).feature_maps) == 1


def test_stages_are_returned_in_their_order():
    all_maps = make_backbone()(images()).feature_maps
    for fields, indices in [
        ({"out_features": ["stem", "stage2"]}, [0, 2]),
        ({"out_features": None, "out_indices": [1, 3]}, [1, 3]),
        ({"out_features": None, "out_indices": (0, 1)}, [0, 1]),
        ({"out_features": None, "out_indices": [-2, -1]}, [2, 3]),
    ]:
        backbone = make_backbone(**fields)
        assert backbone.out_features == [ALL_STAGES[index] for index in indices]
        assert backbone.channels == [32, 32]
        for feature_map, index in zip(backbone(images()).feature_maps, indices, strict=True):
            assert torch.equal(feature_map, all_maps[index])


def test_stages_can_be_changed_on_a_trained_backbone():
    backbone = make_backbone()
    backbone.out_indices = [0, 2]
    assert backbone.config.out_features == ["stem", "stage2"]
    assert len(backbone(images()).feature_maps) == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"out_features": ["stage4"]}, r"out_features must be a subset of stage_names: .*'stage3'\] got \['stage4'\]"),
        ({"out_features": "stage1"}, "out_features must be a list"),
        ({"out_features": ["stage1", "stage1"]}, r"must not contain any duplicates, got \['stage1', 'stage1'\]"),
        ({"out_features": ["stage2", "stem"]}, r"in the same order as stage_names, expected \['stem', 'stage2'\]"),
        ({"out_indices": [4]}, r"out_indices must be valid indices .* got \[4\]"),
        ({"out_indices": [1, 1]}, "out_indices must not contain any duplicates"),
        ({"out_indices": [2, 0]}, r"expected \[0, 2\] got \[2, 0\]"),
        ({"out_features": ["stem"], "out_indices": [1]}, "should correspond to the same stages"),
    ],
    ids=str,
)
def test_wrong_stages(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
    with pytest.raises(ValueError, match=message):
        config = tiny_config()
        config.set_output_features_output_indices(**{"out_features": None, "out_indices": None, **fields})


def test_a_config_of_another_depth_has_its_own_last_stage(tmp_path):
    config = tiny_config()
    config.num_hidden_layers = 2
    assert (config.out_features, config.out_indices) == (["stage2"], [2])
    assert FambaVConfig(**{**tiny_config().to_dict(), "num_hidden_layers": 5}).out_features == ["stage5"]
    tiny_config().save_pretrained(tmp_path)
    assert FambaVConfig.from_pretrained(tmp_path, num_hidden_layers=1).out_features == ["stage1"]


def test_a_saved_config_keeps_its_stages(tmp_path):
    config = tiny_config(out_indices=[0, 2])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["out_features"], saved["out_indices"]) == (["stem", "stage2"], [0, 2])
    assert "stage_names" not in saved
    assert FambaVConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


# ---- heads ----


def test_a_segmentation_head_of_transformers_trains_on_it():
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=tiny_config(out_features=ALL_STAGES),
        hidden_size=8,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=5,
    )
    model = UperNetForSemanticSegmentation(config)
    assert type(model.backbone) is FambaVBackbone
    labels = torch.randint(5, (2, 24, 32), generator=torch.Generator().manual_seed(0))
    outputs = model(images(2, 24, 32), labels=labels)
    assert outputs.logits.shape == (2, 5, 24, 32)
    outputs.loss.backward()
    assert model.backbone.fambav.embeddings.patch_embeddings.projection.weight.grad.any()


# ---- saved folders ----


def test_save_and_load(tmp_path):
    backbone = make_backbone(out_features=["stem", "stage2"])
    backbone.save_pretrained(tmp_path)
    loaded, info = FambaVBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.out_features == ["stem", "stage2"]
    for feature_map, expected in zip(loaded(images()).feature_maps, backbone(images()).feature_maps, strict=True):
        assert torch.equal(feature_map, expected)


@pytest.mark.parametrize("model_class", [FambaVModel, FambaVForImageClassification])
def test_other_checkpoints_load_into_a_backbone(model_class, tmp_path):
    torch.manual_seed(0)
    model = model_class(tiny_config(cls_token_position="middle")).eval()
    model.save_pretrained(tmp_path)
    backbone, info = FambaVBackbone.from_pretrained(tmp_path, out_indices=[1, 3], output_loading_info=True)
    assert not any(info.values())  # keys that are missing, unexpected or of another shape
    base = model if model_class is FambaVModel else model.fambav
    expected = base.state_dict()
    del expected["norm.weight"]
    torch.testing.assert_close(dict(backbone.fambav.state_dict()), dict(expected), rtol=0, atol=0)
    assert [feature_map.shape for feature_map in backbone(images()).feature_maps] == [(2, 32, 4, 4)] * 2


def test_auto_backbone_from_a_config():
    backbone = AutoBackbone.from_config(tiny_config(out_indices=[1, 2]))
    assert type(backbone) is FambaVBackbone and backbone.out_indices == [1, 2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A classifier and its image processor; beside them, inputs and the maps that they give."""
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(cls_token_position="middle", fusion_order="appended"))
    for parameter in model.parameters():  # away from the values that a new model has
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    save_file({"pixel_values": images(2, 20, 24)}, folder.parent / "inputs.safetensors")
    return folder


def expected_maps(folder: Path) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return FambaVBackbone.from_pretrained(folder, out_indices=[1, 3])(images(2, 20, 24)).feature_maps


def load_elsewhere(name: str | Path, saved: Path, place: Path, **environment: str) -> dict[str, Tensor]:
    """The maps that a process without this package computes."""
    script = REPOSITORY / "tests" / "support" / "load_remote_backbone.py"
    inputs = saved.parent / "inputs.safetensors"
    process = run_python("-I", script, name, inputs, place, cwd=place, HF_HOME=str(place / "hf_home"), **environment)
    assert process.returncode == 0, process.stderr
    return load_file(place / "maps.safetensors")


@pytest.fixture
def hub(saved) -> HubServer:
    """A Hub on this machine that holds the classifier as ann/tiny. AutoBackbone asks the Hub first, see README."""
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in saved.iterdir()}
        hub.repositories["ann/tiny"] = Repository(is_private=False, commits=[Commit("model", files)])
        yield hub


@pytest.mark.slow
def test_auto_backbone_loads_a_classifier_where_this_package_is_not_installed(hub, saved, tmp_path):
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    maps = load_elsewhere("ann/tiny", saved, tmp_path, **environment)
    for feature_map, expected in zip(maps.values(), expected_maps(saved), strict=True):
        torch.testing.assert_close(feature_map, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_folder_loads_where_this_package_is_not_installed(saved, tmp_path):
    maps = load_elsewhere(saved, saved, tmp_path)
    for feature_map, expected in zip(maps.values(), expected_maps(saved), strict=True):
        torch.testing.assert_close(feature_map, expected, rtol=0, atol=1e-5)


# ---- features of whole images ----


def test_image_feature_extraction_pipeline(saved):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    extract = pipeline("image-feature-extraction", model=str(saved))
    assert type(extract.model) is FambaVModel
    processor = ViTImageProcessorPil.from_pretrained(saved)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(saved)(**processor(Image.fromarray(pixels), return_tensors="pt"))
    tokens = extract(Image.fromarray(pixels), return_tensors=True)
    torch.testing.assert_close(tokens, expected.last_hidden_state)
    pooled = extract([Image.fromarray(pixels)] * 2, pool=True)
    assert len(pooled) == 2
    torch.testing.assert_close(torch.tensor(pooled[0]), expected.pooler_output)
