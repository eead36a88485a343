"""publish.py as users run it, and `train.py --push_to_hub`."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVForImageClassification
from support.child_process import REPOSITORY, run_python
from support.releases import TOKEN, client_environment, run_main
from support.training_runs import FLAGS, command_line


@pytest.mark.slow
def test_published_model_loads_where_this_package_is_not_installed(hub, release, tmp_path):
    torch.manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "image": torch.randint(256, (23, 31, 3), dtype=torch.uint8),
    }
    (tmp_path / "ann").mkdir()
    save_file(inputs, tmp_path / "ann" / "inputs.safetensors")  # where the script below looks for it
    environment = client_environment(hub, tmp_path)
    process = run_python(
        REPOSITORY / "training" / "publish.py", release, "tiny", "--private", "--tag", "v1", **environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"published: {hub.endpoint}/ann/tiny\n"
    assert TOKEN not in process.stderr
    assert hub.repositories["ann/tiny"].is_private

    script = REPOSITORY / "tests" / "support" / "load_remote_code.py"
    process = run_python("-I", script, "ann/tiny", tmp_path, "modeling_fambav", cwd=tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["code_from"] == ["transformers_modules"]
    assert "modeling_fambav" not in report["imported"]

    model = FambaVForImageClassification.from_pretrained(release)
    logits = load_file(tmp_path / "tensors.safetensors")["logits"]
    torch.testing.assert_close(logits, model(inputs["pixel_values"]).logits.detach(), rtol=0, atol=0)
    image = ViTImageProcessorPil.from_pretrained(release)(inputs["image"].numpy(), return_tensors="pt")
    scores = model(**image).logits.softmax(-1)[0]
    answers = {answer["label"]: answer["score"] for answer in report["answers"]}
    assert answers == pytest.approx({name: scores[model.config.label2id[name]].item() for name in answers})


@pytest.mark.slow
def test_onnx_goes_with_the_release(hub, repository, folder, monkeypatch):
    run_main(monkeypatch, folder, "ann/tiny", "--onnx")
    path = folder / "onnx" / "model.onnx"
    written = path.read_bytes()
    assert repository.commits[-1].files["onnx/model.onnx"] == written
    run_main(monkeypatch, folder, "ann/tiny", "--onnx")
    assert path.read_bytes() == written and len(repository.commits) == 2  # an empty one, and the release


def test_command_ends_with_a_line_that_says_what_is_wrong(hub, folder, monkeypatch, capsys):
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*config\.json missing"):
        run_main(monkeypatch, folder, "tiny")
    assert hub.requests == []


@pytest.mark.parametrize("tag", ["", "a b", "a..b", "v1.lock", "-v1", "v1.", "v/1"])
def test_command_refuses_a_tag_that_git_would_refuse(hub, release, tag, monkeypatch):
    with pytest.raises(SystemExit, match=re.escape(f"error: --tag {tag!r}: expected letters")):
        run_main(monkeypatch, release, "tiny", f"--tag={tag}")
    assert hub.requests == []


@pytest.mark.slow
def test_training_publishes_what_it_trained(hub, tmp_path):
    environment = client_environment(hub, tmp_path)
    flags = command_line(**{**FLAGS, "max_train_steps": 4, "push_to_hub": True, "hub_private_repo": True})
    folder = tmp_path / "my-digits"
    process = run_python(REPOSITORY / "training" / "train.py", *flags, "--output_dir", folder, **environment)
    assert process.returncode == 0, process.stderr
    assert f"published: {hub.endpoint}/ann/my-digits" in process.stdout
    assert TOKEN not in process.stdout + process.stderr
    repository = hub.repositories["ann/my-digits"]
    assert repository.is_private
    files = repository.main.files
    for name in ("model.safetensors", "README.md", "all_results.json", "training.png", "metrics.jsonl"):
        assert files[name] == (folder / name).read_bytes()
    assert 'model="ann/my-digits"' in files["README.md"].decode()


@pytest.mark.slow
def test_a_hub_that_refuses_stops_a_run_before_it_begins(hub, tmp_path):
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_wrong", "HF_HUB_OFFLINE": "0"}
    words = [*command_line(**FLAGS), "--push_to_hub", "--output_dir", tmp_path / "out"]
    process = run_python(REPOSITORY / "training" / "train.py", *words, HF_HOME=str(tmp_path), **environment)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and "hf_wrong" not in process.stdout + process.stderr
