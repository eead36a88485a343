"""A classifier in eight bits: what is quantised, what is measured, the folder that is left, and its way to the Hub."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard

import publish
import quantize
from fambav_training.data.pixels import CachedImages, normalize
from fambav_training.evaluation.scoring import load_classifier
from fambav_training.export import precisions
from fambav_training.export.onnx_file import export_onnx
from fambav_training.export.precisions import Precision, measure_precisions
from fambav_training.export.quantization import quantize_onnx, quantize_torch
from fambav_training.release.hub import PublishError, find_files
from fambav_training.release.quantized import ONNX_FILE, OWNER, QUANTIZED_FILE, base_model_of, write_quantized_release
from support.helpers import random_tensor, save_classifier

ROW = {"name": "ONNX Runtime, int8 static", "bytes": 5, "top1": 68.5, "same_class": 90.0}
REPORT = {
    "model": "outputs/shapes",
    "method": "static",
    "dataset": "ann/shapes",
    "split": "test",
    "validation_images": 1000,
    "calibration_images": 64,
    "rounds": 3,
    "precisions": [ROW],
    "device": "cpu: some processor",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random classifier of ten classes, wide enough for weights to be most of its file."""
    return save_classifier(
        tmp_path_factory.mktemp("models") / "shapes", num_labels=10, hidden_size=64, num_hidden_layers=2
    )


@pytest.fixture(scope="module")
def exported(model_folder):
    path = model_folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    export_onnx(load_classifier(str(model_folder), {})[0].eval(), path)
    return path


@pytest.fixture
def quantized_folder(model_folder, tmp_path):
    """What the command leaves, around a file that is no model."""
    model, processor = load_classifier(str(model_folder), {})
    (tmp_path / "static.onnx").write_bytes(b"model")
    write_quantized_release(
        tmp_path / "int8", model.config, processor, tmp_path / "static.onnx", REPORT, "ann/shapes", "| a table |"
    )
    return tmp_path / "int8"


# ---- quantising ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_products_with_weights_are_in_eight_bits_and_nothing_else(exported, tmp_path, method):
    quantize_onnx(exported, tmp_path / "int8.onnx", method, random_tensor(8, 3, 16, 16, seed=0))
    before, after = onnx.load(exported).graph, onnx.load(tmp_path / "int8.onnx").graph
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * exported.stat().st_size
    small = [
        tensor for tensor in after.initializer if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    ]
    assert sum(np.prod(tensor.dims) for tensor in small) > 64 * 256  # in_proj alone

    def count(graph, kind: str) -> int:
        return sum(node.op_type == kind for node in graph.node)

    weights = {tensor.name for tensor in before.initializer}
    without_weight = [node for node in before.node if node.op_type == "MatMul" and not weights & {*node.input}]
    if method == "dynamic":
        assert count(after, "MatMul") == len(without_weight) > 0
    for kind in ("Scan", "TopK", "ReduceMean"):
        assert count(before, kind) == count(after, kind) > 0

    pixel_values = {"pixel_values": random_tensor(5, 3, 16, 16, seed=1).numpy()}
    ours, theirs = (
        onnxruntime.InferenceSession(path).run(["logits"], pixel_values)[0]
        for path in (exported, tmp_path / "int8.onnx")
    )
    assert not np.array_equal(ours, theirs)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "arguments, expected",
    [(("some", None), "method 'some': expected one of"), (("static", None), "method 'static': expected images")],
    ids=str,
)
def test_wrong_methods_are_refused(tmp_path, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", *arguments)


def test_torchao_that_is_missing_is_a_sentence(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model, _ = load_classifier(str(model_folder), {})
    with pytest.raises(ValueError, match="torchao: not installed, try `pip install torchao`"):
        quantize_torch(model, "weight_only")
    with pytest.raises(ValueError, match="method 'static': expected one of"):
        quantize_torch(model, "static")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weight_only", "dynamic"])
def test_torchao_leaves_the_model_as_it_was(model_folder, method):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model, _ = load_classifier(str(model_folder), {})
    pixel_values = random_tensor(4, 3, 16, 16, seed=1)
    with torch.inference_mode():
        before = model.eval()(pixel_values).logits
        quantized = quantize_torch(model, method)(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=0, atol=0)
    assert not torch.equal(quantized, before)
    assert np.corrcoef(quantized.ravel(), before.ravel())[0, 1] > 0.9


# ---- measuring ----


def test_what_is_measured_of_precisions(model_folder, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(precisions.time, "process_time", lambda: float(next(clock)))
    _, processor = load_classifier(str(model_folder), {})
    images = CachedImages.__new__(CachedImages)
    images.pixels = torch.stack([torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (0, 0, 255, 255)])
    images.labels = torch.tensor([0, 0, 1, 0])
    threshold = normalize(images.pixels, processor).mean().item()

    def bright(pixel_values):
        is_bright = (pixel_values.mean(dim=(1, 2, 3)) > threshold).numpy()
        return np.stack([~is_bright, is_bright], axis=1).astype(float)

    def always_first(pixel_values):
        return np.tile([1.0, 0.0], (len(pixel_values), 1))

    rows = measure_precisions([Precision("a", 10, bright), Precision("b", 5, always_first)], images, processor, 3)
    assert [row["name"] for row in rows] == ["a", "b"] and [row["bytes"] for row in rows] == [10, 5]
    assert [row["top1"] for row in rows] == [75.0, 75.0] and [row["same_class"] for row in rows] == [100.0, 50.0]
    # A second for 8 passes of 1 image, and for 2 of the 4 that there are
    assert rows[1]["milliseconds"] == {1: 125.0, 32: 125.0} and rows[1]["relative"] == {1: 1.0, 32: 1.0}


@pytest.mark.slow
def test_the_command(exported, model_folder, monkeypatch, tmp_path, capsys):
    words = ["--rounds", 1, "--max_eval_samples", 20, "--calibration_samples", 8, "--base_model", "ann/shapes"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, (model_folder, tmp_path / "int8", *words))])
    threads = torch.get_num_threads()
    try:
        quantize.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "int8" / QUANTIZED_FILE).read_text())
    names = [row["name"] for row in report["precisions"]]
    assert names[:2] == ["torch, float32", "torch, bfloat16"] and names[-1] == "ONNX Runtime, int8 static"
    float32, *_, int8 = report["precisions"]
    assert report["validation_images"] == 20 and float32["same_class"] == 100
    assert (
        0.5 < next(row for row in report["precisions"] if row["name"] == "ONNX Runtime, float32")["same_class"] / 100
    )
    assert int8["bytes"] == (tmp_path / "int8" / ONNX_FILE).stat().st_size < float32["bytes"]
    assert all(row["name"] in printed for row in report["precisions"])
    onnxruntime.InferenceSession(tmp_path / "int8" / ONNX_FILE)
    assert set(find_files(tmp_path / "int8")) == {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        ONNX_FILE,
        QUANTIZED_FILE,
    }


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--rounds", "0"], "error: --rounds 0: expected a number >= 1"),
        (["--calibration_samples", "0"], "error: --calibration_samples 0: expected a number >= 1"),
        (["--base_model", "shapes"], "error: --base_model shapes: expected OWNER/NAME"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_folder, monkeypatch, tmp_path, words, expected):
    monkeypatch.setattr(sys, "argv", ["quantize.py", str(model_folder), str(tmp_path / "int8"), *words])
    with pytest.raises(SystemExit) as end:
        quantize.main()
    assert end.value.code == expected and not (tmp_path / "int8").exists()


def test_a_folder_that_exists_is_not_overwritten(model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["quantize.py", str(model_folder), str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        quantize.main()
    assert end.value.code == f"error: {tmp_path}: exists already; remove it or name another folder"


# ---- the release ----


def test_the_card_names_the_model_that_was_quantised(quantized_folder):
    card = ModelCard.load(quantized_folder / "README.md")
    assert card.data.base_model == "ann/shapes" and card.data.base_model_relation == "quantized"
    assert card.data.eval_results[0].metric_value == 68.5
    assert "| a table |" in card.text and "1,000 images of shapes" in card.text
    assert "auto_map" not in json.loads((quantized_folder / "config.json").read_text())


def test_a_base_model_is_a_repository(tmp_path):
    assert base_model_of(None, str(tmp_path / "..")) == f"{OWNER}/{tmp_path.parent.name}"
    assert base_model_of(None, "ann/shapes") == "ann/shapes"
    assert base_model_of("bob/shapes", str(tmp_path)) == "bob/shapes"


def test_a_quantised_folder_is_published_whole(quantized_folder):
    assert ONNX_FILE in find_files(quantized_folder)
    (quantized_folder / ONNX_FILE).unlink()
    with pytest.raises(
        PublishError, match=r"onnx/model_quantized\.onnx missing or empty, expected the folder of quan"
    ):
        find_files(quantized_folder)


def test_a_quantised_folder_needs_no_onnx(quantized_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["publish.py", str(quantized_folder), "ann/int8", "--onnx"])
    with pytest.raises(SystemExit, match="error: --onnx: .* holds a quantised model"):
        publish.main()
