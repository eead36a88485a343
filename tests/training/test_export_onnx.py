"""ONNX files give the model's logits for any batch size and any fusion; what does not agree is not written."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import export_onnx
from fambav_training.export import onnx_file
from modeling_fambav import FambaVForImageClassification, selective_scan_backend
from support.helpers import random_tensor, tiny_config


def small_classifier(**fields) -> FambaVForImageClassification:
    """Two layers, both of which fuse unless `fields` say otherwise."""
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 2, "hidden_size": 16, "fusion_strategy": "all", **fields}
    return FambaVForImageClassification(tiny_config(**fields)).eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_classifier().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, words)])
    export_onnx.main()


# ---- the file ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"fusion_strategy": "none", "num_hidden_layers": 1},
        {
            "fusion_order": "appended",
            "cls_token_position": "middle",
            "fusion_reduction": "size_weighted",
            "fusion_metric": "euclidean",
            "fusion_window": 3,
        },
        {
            "cls_token_position": "middle",
            "fusion_scale_time_step": True,
            "fusion_metric": "dot",
            "image_size": (12, 20),
            "hidden_size": 24,  # which the kernel of the norm does not take
        },
    ],
    ids=str,
)
def test_logits_and_token_maps_are_those_of_the_model(fields, tmp_path):
    model, path = small_classifier(**fields), tmp_path / "model.onnx"
    for name, bias in model.named_parameters():
        if name.endswith("dt_proj.bias"):  # time steps from almost nothing to where softplus is the identity
            bias.data = torch.linspace(-30, 30, len(bias))
    backend = selective_scan_backend(model.classifier.weight)
    onnx_file.export_onnx(model, path, token_maps=True)
    assert selective_scan_backend(model.classifier.weight) == backend
    assert max(onnx_file.differences(model, path).values()) <= 1e-5
    graph = onnx.load(path).graph
    op_types = [node.op_type for node in graph.node]
    assert op_types.count("Scan") == model.config.num_hidden_layers  # no step of a scan is a node of the graph
    assert {node.domain for node in graph.node} == {""}
    pixel_values = random_tensor(3, 3, *model.config.image_height_width, seed=1)
    (token_maps,) = onnx_file.open_session(path).run(["token_maps"], {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        expected = torch.stack(model(pixel_values, output_token_maps=True).token_maps, dim=1)
    np.testing.assert_array_equal(token_maps, expected.numpy())
    assert not any(node.metadata_props for node in graph.node)  # which would tell the paths of this machine


# ---- the command ----


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path):
    with export_onnx.new_file(tmp_path / "a.onnx") as unfinished:
        unfinished.write_bytes(b"new")
        assert not (tmp_path / "a.onnx").exists()
    (tmp_path / "b.onnx").touch()
    assert (tmp_path / "a.onnx").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "a.onnx").stat().st_mode == (tmp_path / "b.onnx").stat().st_mode


def test_the_command_writes_a_file_for_any_batch_size(model_folder, monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "model.onnx"
    run(monkeypatch, model_folder, path, "--fusion_strategy", "upper", "--fusion_tokens", 3)
    printed = capsys.readouterr().out
    assert "batch size 5: logits differ" in printed and "fusion upper, tokens per layer 14 11" in printed
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]

    model = FambaVForImageClassification.from_pretrained(model_folder).eval()
    model.config.fusion_strategy, model.config.fusion_tokens = "upper", 3
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch_size in (1, 4):
        pixel_values = random_tensor(batch_size, 3, 16, 16, seed=batch_size)
        (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(pixel_values).logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_file_that_disagrees_is_not_written(model_folder, monkeypatch, tmp_path, difference):
    monkeypatch.setattr(onnx_file, "export_onnx", lambda model, path, token_maps: path.write_bytes(b"wrong"))
    monkeypatch.setattr(onnx_file, "differences", lambda model, path: {1: difference, 2: 0.0})
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, model_folder, tmp_path / "model.onnx")
    assert "not kept: its logits differ" in end.value.code and "expected at most 0.0001" in end.value.code
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, model_folder, tmp_path / "model.onnx")
    assert "onnx, onnxruntime, onnxscript: not installed" in end.value.code


def test_another_model_is_refused(monkeypatch, tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "vit", tmp_path / "model.onnx")
    assert "'vit'" in end.value.code and not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "output, words, expected",
    [
        ("there.onnx", [], "there.onnx: exists already"),
        ("there.onnx/model.onnx", [], "there.onnx"),
        ("model.onnx", ["--fusion_tokens", "0"], "fusion_tokens=0"),
        ("model.onnx", ["--fusion_strategy", "some"], "fusion_strategy"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_folder, monkeypatch, tmp_path, output, words, expected):
    (tmp_path / "there.onnx").write_text("precious")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, model_folder, tmp_path / output, *words)
    assert end.value.code.startswith("error: ") and expected in end.value.code
    assert [file.name for file in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "precious"


def test_a_missing_model_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "missing", tmp_path / "model.onnx")
    assert end.value.code.startswith("error: ") and "missing" in end.value.code
