"""The checkpoints under model_cards/ load by their own code alone, and answer and are documented as when released."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from modeling_fambav import FambaVConfig
from support.child_process import REPOSITORY, run_python

MODEL_CARDS = REPOSITORY / "model_cards"
CHECKPOINTS = sorted(path.parent for path in MODEL_CARDS.glob("*/model.safetensors"))
# At most 3 MB, so that a clone of the repository stays small
MAX_WEIGHT_BYTES = 3_000_000

_CLASSIFY = """
import json, sys
sys.modules["modeling_fambav"] = None  # as if it were not installed
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps({image: classify(image, top_k=3) for image in sys.argv[2:]}))
"""


def test_there_is_a_released_checkpoint():
    assert CHECKPOINTS


@pytest.fixture(params=CHECKPOINTS, ids=lambda path: path.name)
def checkpoint(request) -> Path:
    return request.param


@pytest.mark.slow
def test_it_answers_without_this_package_as_it_did_when_it_was_released(checkpoint, tmp_path):
    expected = json.loads((checkpoint / "examples" / "answers.json").read_text())
    images = [checkpoint / "examples" / name for name in expected]
    assert images and all(image.exists() for image in images)
    process = run_python("-I", "-c", _CLASSIFY, checkpoint, *images, cwd=tmp_path, HF_HOME=str(tmp_path / "hf_home"))
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.splitlines()[-1])
    for image in images:
        ours, released = answers[str(image)], expected[image.name]
        assert [answer["label"] for answer in ours] == [answer["label"] for answer in released]
        for answer, released_answer in zip(ours, released):
            assert answer["score"] == pytest.approx(released_answer["score"], abs=1e-3)


def test_its_code_is_that_of_the_package(checkpoint):
    code = {path.name for path in (REPOSITORY / "modeling_fambav").glob("*.py")} - {"__init__.py"}
    assert {path.name for path in checkpoint.glob("*.py")} == code
    for name in code:
        # No links, which a checkout on Windows turns into text; `make code` copies the files
        assert not (checkpoint / name).is_symlink()
        assert (checkpoint / name).read_bytes() == (REPOSITORY / "modeling_fambav" / name).read_bytes(), name


def test_its_weights_are_small_and_those_of_its_results(checkpoint):
    weights = checkpoint / "model.safetensors"
    assert weights.stat().st_size <= MAX_WEIGHT_BYTES
    results = json.loads((checkpoint / "all_results.json").read_text())
    with safe_open(weights, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    # Those of batch norm are statistics
    sizes = [math.prod(shape) for name, shape in shapes.items() if "running_" not in name and "num_batch" not in name]
    assert sum(sizes) == results["num_parameters"]
    config = FambaVConfig.from_pretrained(checkpoint)
    assert config.sequence_lengths == results["sequence_lengths"]


def test_the_index_and_the_card_give_its_accuracy(checkpoint):
    results = json.loads((checkpoint / "all_results.json").read_text())
    accuracy = f"{results['top1']:.2f}"
    assert accuracy in (checkpoint / "README.md").read_text()
    index = (MODEL_CARDS / "README.md").read_text()
    assert f"]({checkpoint.name}" in index and accuracy in index
