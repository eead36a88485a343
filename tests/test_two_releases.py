"""Checkpoints whose code differs, side by side in one process: each computes with its own."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_fambav import FambaVForImageClassification, operators, rms_norm, selective_scan_torch, token_fusion
from support.child_process import REPOSITORY, run_python
from support.helpers import random_tensor, tiny_config

# What the newer release changes: torch's scan reads out twice as much, by a new argument of its operator.
_CHANGES_OF_THE_SCAN = {
    "A: Tensor, B: Tensor, C: Tensor) -> Tensor:": "A: Tensor, B: Tensor, C: Tensor, factor: float) -> Tensor:",
    "    return y.squeeze(3).": "    return factor * y.squeeze(3).",
    "def _shapes(x, delta, A, B, C):": "def _shapes(x, delta, A, B, C, factor):",
    "ctx.save_for_backward(*inputs)": "ctx.save_for_backward(*inputs[:5])",
    "return _recurrence_backward(dy, *ctx.saved_tensors)": (
        "return *_recurrence_backward(2 * dy, *ctx.saved_tensors), None"
    ),
    "in_scan_order(B), in_scan_order(C))": "in_scan_order(B), in_scan_order(C), 2.0)",
}
# and the kernel of the norm, whose results are half as large.
_CHANGES_OF_THE_NORM = {
    "store(out, t, d, load(x, t, d) * full(scale) * load(weight, 0, d))": (
        "store(out, t, d, load(x, t, d) * full(scale * np.float32(0.5)) * load(weight, 0, d))"
    )
}


def change(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text()
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    """A folder with the checkpoints `old`, `same` (the same code again) and `new`, all with the same weights."""
    place = tmp_path_factory.mktemp("releases")
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(num_hidden_layers=1))
    for parameter in model.parameters():  # a new layer hardly changes the tokens
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(place / "old")
    for name in ("same", "new"):
        shutil.copytree(place / "old", place / name)
    change(place / "new" / "selective_scan_torch.py", _CHANGES_OF_THE_SCAN)
    change(place / "new" / "rms_norm_numba.py", _CHANGES_OF_THE_NORM)
    save_file({"pixel_values": random_tensor(2, 3, 16, 16, seed=0)}, place / "inputs.safetensors")
    return place


def computed(releases: Path, place: Path, backend: str, *names: str) -> dict[str, Tensor]:
    script, results = REPOSITORY / "tests" / "support" / "load_two_releases.py", place / "results.safetensors"
    folders = [releases / name for name in names]
    environment = {"HF_HOME": str(place / "hf_home"), "FAMBAV_SCAN_BACKEND": backend}
    process = run_python("-I", script, releases / "inputs.safetensors", results, *folders, cwd=place, **environment)
    assert process.returncode == 0, process.stderr
    return load_file(results)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_each_computes_with_its_own_code(releases, tmp_path, backend):
    results = {}
    for order in (("old", "new"), ("new", "old")):
        (tmp_path / order[0]).mkdir()
        results[order[0]] = computed(releases, tmp_path / order[0], backend, *order)
    everything = results["old"] | {f"again.{key}": tensor for key, tensor in results["new"].items()}
    for name in ("old", "new"):
        # before anything else was loaded
        alone = {quantity: results[name][f"first.{name}.{quantity}"] for quantity in ("logits", "gradient")}
        for key, tensor in everything.items():
            if f".{name}." in key:
                expected = alone["gradient" if key.endswith("gradient") else "logits"]
                torch.testing.assert_close(tensor, expected, msg=lambda text: f"{key}: {text}")
    old, new = (results[name][f"first.{name}.logits"] for name in ("old", "new"))
    assert (old - new).abs().max() > 1e-2
    assert len(results["old"]) == len(results["new"]) == 14


def operators_of(folder: Path, *names: str) -> list:
    """`module.operator` of the code in a folder, which is loaded as transformers loads it."""
    model_class = get_class_from_dynamic_module("modeling_fambav.FambaVForImageClassification", str(folder))
    package = model_class.__module__.rpartition(".")[0]
    assert package.startswith("transformers_modules.")
    return [getattr(sys.modules[f"{package}.{module}"], name) for module, name in (name.split(".") for name in names)]


def test_operators_of_other_code_leave_ours_alone(releases):
    tensors = [random_tensor(1, 2, 5, channels, seed=channels) for channels in (3, 3, 4, 4)]
    x, delta, B, C = (tensor.abs() for tensor in tensors)
    arguments = x, delta, -random_tensor(1, 3, 4, seed=5).abs(), B, C
    expected = selective_scan_torch.recurrence(*arguments)
    (newer,) = operators_of(releases / "new", "selective_scan_torch.recurrence")
    for _ in range(2):
        assert torch.equal(newer(*arguments, 2.0), 2 * expected)
        assert torch.equal(selective_scan_torch.recurrence(*arguments), expected)


def test_the_same_code_shares_its_operators(releases):
    names = ["selective_scan_torch.recurrence", "rms_norm._rms_norm", "token_fusion._merge"]
    ours = [selective_scan_torch.recurrence, rms_norm._rms_norm, token_fusion._merge]
    assert all(other is own for other, own in zip(operators_of(releases / "same", *names), ours))


def test_names_follow_every_file_that_decides_what_operators_compute(monkeypatch, tmp_path):
    package = Path(operators.__file__).parent
    names = {path.stem for path in package.glob("*.py")}
    without_operators = {
        "__init__",
        "configuration_fambav",
        "embeddings",
        "field_validators",
        "layers",
        "modeling_fambav",
    }
    assert names - set(operators._SOURCES) == without_operators
    assert set(operators._SOURCES) <= names
    assert selective_scan_torch.recurrence.name() == f"fambav::recurrence_{operators._SUFFIX}"

    for name in operators._SOURCES:
        (tmp_path / f"{name}.py").write_bytes(b"before\n")
    monkeypatch.setattr(operators, "__file__", str(tmp_path / "operators.py"))
    before = operators.digest_of(operators._SOURCES)
    for name in operators._SOURCES:
        (tmp_path / f"{name}.py").write_bytes(b"after\n")
        assert operators.digest_of(operators._SOURCES) != before
        (tmp_path / f"{name}.py").write_bytes(b"before\r\n")  # as git may write it on Windows
    assert operators.digest_of(operators._SOURCES) == before
    (tmp_path / "rms_norm.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"^rms_norm\.py is missing beside .*operators\.py"):
        operators.digest_of(operators._SOURCES)
