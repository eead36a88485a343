"""A folder with `onnx/model.onnx` runs in transformers.js, and answers as the model does in Python."""

import json
import shutil
import subprocess

import pytest
import torch
from transformers import pipeline

from fambav_training.evaluation.scoring import load_classifier
from fambav_training.export.onnx_file import export_for_hub
from support.child_process import DEADLINE_SECONDS, REPOSITORY
from support.helpers import noise, save_classifier

PACKAGE = "@huggingface/transformers@4.3.1"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder in which npm has installed transformers.js."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("packages")
    # Its scripts would fetch ONNX Runtime's files for GPUs
    command = [npm, "install", PACKAGE, "--ignore-scripts", "--no-audit", "--no-fund", f"--prefix={folder}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    if process.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {process.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_transformers_js_answers_as_python_does(packages, tmp_path):
    """With fusion, on an image of the model's size: libraries resize in ways of their own."""
    folder = save_classifier(tmp_path / "models" / "shapes", num_labels=4)
    assert export_for_hub(folder) == folder / "onnx" / "model.onnx"
    image = noise("RGB", 16, 16)
    image.save(tmp_path / "image.png")
    script = REPOSITORY / "tests" / "support" / "transformers_js.mjs"
    command = ["node", script, packages, folder.parent, folder.name, tmp_path / "image.png"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)

    model, processor = load_classifier(str(folder), {})
    with torch.no_grad():
        logits = model.eval()(**processor(image, return_tensors="pt")).logits[0]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=0, atol=1e-4)
    expected = pipeline("image-classification", str(folder), trust_remote_code=True)(image, top_k=4)
    assert [answer["label"] for answer in found["answers"]] == [answer["label"] for answer in expected]
    scores = [answer["score"] for answer in expected]
    assert [answer["score"] for answer in found["answers"]] == pytest.approx(scores, abs=1e-5)
