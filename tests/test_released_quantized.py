"""The quantised models under model_cards/ are those of the checkpoints beside them, and can be published."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor

from fambav_training.release.hub import find_files
from fambav_training.release.quantized import ONNX_FILE, OWNER, QUANTIZED_FILE
from support.child_process import REPOSITORY

MODEL_CARDS = REPOSITORY / "model_cards"
FOLDERS = sorted(path.parent for path in MODEL_CARDS.glob(f"*/{QUANTIZED_FILE}"))


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


def test_there_is_one():
    assert FOLDERS


def test_it_is_whole_and_names_its_base(folder):
    assert (folder / ONNX_FILE) in find_files(folder).values()
    card = ModelCard.load(folder / "README.md").data
    owner, name = card.base_model.split("/")
    assert owner == OWNER and (MODEL_CARDS / name / "model.safetensors").exists()
    assert card.base_model_relation == "quantized"


def test_it_answers_nearly_as_its_base(folder):
    """The examples that the base is sure of."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    base = MODEL_CARDS / ModelCard.load(folder / "README.md").data.base_model.split("/")[1]
    answers = json.loads((base / "examples" / "answers.json").read_text())
    sure = {name: best["label"] for name, (best, *_) in answers.items() if best["score"] > 0.5}
    processor = AutoImageProcessor.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / ONNX_FILE)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    found = {}
    for name in sure:
        image = Image.open(base / "examples" / name).convert("RGB")
        inputs = dict(processor(image, return_tensors="np"))
        found[name] = names[str(session.run(["logits"], inputs)[0].argmax())]
    assert sure and found == sure


def test_its_row_is_on_the_page(folder):
    page = (MODEL_CARDS / "README.md").read_text()
    for row in json.loads((folder / QUANTIZED_FILE).read_text())["precisions"]:
        times = [f"{row['milliseconds'][size]:.2f} ({row['relative'][size]:.2f})" for size in ("1", "32")]
        numbers = f"{row['bytes'] / 1e6:.2f} | {row['top1']:.2f} | {row['same_class']:.2f}"
        assert f"| {row['name']} | {numbers} | {' | '.join(times)} |" in page
