"""The choice of the backend: by device, by name, and what is said where one is missing or broken."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.testing_utils import CaptureLogger

from modeling_fambav import backends, selective_scan_backend, set_selective_scan_backend
from modeling_fambav.selective_scan import selective_scan
from support.child_process import run_python
from support.helpers import scan_inputs

TENSOR = torch.empty(1, device="cpu")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    """As in a new process: nothing has been chosen or loaded."""
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setattr(backends, "_problems", {})
    monkeypatch.setattr(backends, "_choices", {})


def fail(monkeypatch, name: str, error: Exception) -> None:
    """A backend raises this as soon as its kernels are loaded."""

    def load():
        raise error

    monkeypatch.setitem(backends._providers, name, [load])


def missing(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


def choice(device: str) -> tuple[str, str]:
    """What is chosen, three times over, and what was logged."""
    with CaptureLogger(backends.logger) as captured:
        chosen = {backends._choice(device) for _ in range(3)}
    assert len(chosen) == 1
    return chosen.pop(), captured.out


def test_by_device_and_dtype(monkeypatch):
    monkeypatch.setitem(backends._providers, "mamba-ssm", [])
    assert selective_scan_backend(TENSOR) == "numba"
    assert selective_scan_backend(TENSOR.bfloat16()) == "numba"
    assert selective_scan_backend(TENSOR.double()) == "torch"
    set_selective_scan_backend("torch")
    assert selective_scan_backend(TENSOR) == selective_scan_backend(torch.empty(1, device="meta")) == "torch"
    for name, device in (("mamba-ssm", "cpu"), ("numba", "meta")):
        set_selective_scan_backend(name)
        with pytest.raises(ValueError, match=f"'{name}': expected a tensor on one of .*, got '{device}'"):
            selective_scan_backend(torch.empty(1, device=device))


def test_set_returns_what_it_was_before():
    assert set_selective_scan_backend("torch") is None
    assert set_selective_scan_backend(None) == "torch"


def test_unknown_backend():
    with pytest.raises(ValueError, match="'nonsense': expected one of.*mamba-ssm.*numba.*torch"):
        set_selective_scan_backend("nonsense")
    assert backends._chosen is None


@pytest.mark.parametrize(
    "name, module", [("numba", "numba"), ("mamba-ssm", "mamba_ssm"), ("triton", "triton")], ids=str
)
def test_a_backend_that_is_asked_for_and_missing(monkeypatch, name, module):
    fail(monkeypatch, name, missing(module))
    with pytest.raises(ImportError, match=f"^scan backend '{name}': {name} is not installed; `pip install {name}`$"):
        set_selective_scan_backend(name)
    # The environment variable is read when the module is imported, and checked at the first scan.
    monkeypatch.setattr(backends, "_chosen", name)
    with pytest.raises(ImportError, match=f"`pip install {name}`"):
        selective_scan(**scan_inputs(1, 1, 2, 16, 1))


@pytest.mark.parametrize("name", ["numba", "mamba-ssm", "triton"])
def test_a_backend_that_is_asked_for_and_broken(monkeypatch, name):
    error = ImportError("it needs\nNumPy 2.2")
    fail(monkeypatch, name, error)
    expected = f"{name} is installed but fails with ImportError: it needs NumPy 2.2; mend or update it"
    with pytest.raises(ImportError, match=expected) as raised:
        set_selective_scan_backend(name)
    assert raised.value.__cause__ is error


def test_a_part_that_a_package_lacks_is_not_the_package(monkeypatch):
    fail(monkeypatch, "mamba-ssm", missing("causal_conv1d_cuda"))
    with pytest.raises(ImportError, match="mamba-ssm is installed but fails with .*'causal_conv1d_cuda'"):
        set_selective_scan_backend("mamba-ssm")


@pytest.mark.parametrize(
    "error, reason",
    [
        (missing("numba"), "numba is not installed, `pip install numba`."),
        (
            ImportError("Numba needs NumPy 2.2 or less"),
            "fails with ImportError: Numba needs NumPy 2.2 or less, mend",
        ),
        (
            RuntimeError("LLVM ERROR: out of luck"),
            "fails with RuntimeError: LLVM ERROR: out of luck, mend",
        ),
        (OSError("libllvmlite.so: undefined symbol"), "fails with OSError: libllvmlite.so: undefined symbol"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_numba_torch_computes_and_says_why_once(monkeypatch, error, reason):
    inputs = scan_inputs(2, 1, 5, 16, 4)
    set_selective_scan_backend("torch")
    expected = selective_scan(**inputs)
    set_selective_scan_backend(None)
    fail(monkeypatch, "numba", error)
    with CaptureLogger(backends.logger) as captured:
        for _ in range(3):
            assert torch.equal(selective_scan(**inputs), expected)
    assert captured.out.count("\n") == 1 and reason in captured.out
    assert "Famba-V computes with plain torch operations on 'cpu', which is slow: numba is" in captured.out


def test_on_a_gpu_the_next_backend_computes(monkeypatch):
    monkeypatch.setitem(backends._providers, "mamba-ssm", [])
    monkeypatch.setitem(backends._providers, "triton", [])
    assert choice("cuda") == ("triton", "")  # one set of kernels is enough
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends, "_problems", {})
    fail(monkeypatch, "triton", RuntimeError("0 active drivers ([])"))
    chosen, said = choice("cuda")
    assert chosen == "mamba-ssm" and said.count("\n") == 1
    assert "with the backend 'mamba-ssm' on 'cuda': triton is installed but fails with RuntimeError: 0 active" in said


def test_on_a_gpu_without_any_kernels(monkeypatch):
    fail(monkeypatch, "mamba-ssm", missing("mamba_ssm"))
    fail(monkeypatch, "triton", RuntimeError("0 active drivers ([])"))
    chosen, said = choice("cuda")
    assert chosen == "torch" and said.count("\n") == 1
    assert "`pip install mamba-ssm`" in said and "triton is installed but fails with RuntimeError: 0 active" in said


def test_a_device_without_kernels_is_told_once_that_it_is_slow():
    chosen, said = choice("mps")
    assert chosen == "torch" and said.count("\n") == 1
    assert "on 'mps', which is slow: there are no kernels for it" in said
    assert choice("meta") == ("torch", "")  # nothing is computed there


def test_a_compiled_function_falls_back_as_well(monkeypatch):
    inputs = scan_inputs(2, 1, 5, 16, 4)
    fail(monkeypatch, "numba", ImportError("broken"))
    torch.compiler.reset()
    with CaptureLogger(backends.logger) as captured:
        out = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")(**inputs)
    assert "broken" in captured.out
    set_selective_scan_backend("torch")
    torch.testing.assert_close(out, selective_scan(**inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "nonsense"])
def test_the_environment_variable_chooses_the_backend(name):
    code = "import torch, modeling_fambav; print(modeling_fambav.selective_scan_backend(torch.empty(1)))"
    child = run_python("-c", code, FAMBAV_SCAN_BACKEND=name)
    if name == "nonsense":
        assert "ValueError: scan backend 'nonsense': expected one of" in child.stderr
    else:
        assert child.stdout.strip() == name


@pytest.mark.slow
def test_a_numba_that_cannot_be_imported(tmp_path):
    """The real thing: a package of that name, in the way of the one that works."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(
        'raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.9")'
    )
    code = "import torch, modeling_fambav; print(modeling_fambav.selective_scan_backend(torch.empty(1)))"
    package = Path(backends.__file__).parents[1]
    child = run_python("-c", code, PYTHONPATH=f"{tmp_path}:{package}")
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "torch"
    assert child.stderr.count("Numba needs NumPy 2.2 or less") == 1
    assert "pip install numba" not in child.stderr and "numba" in sys.modules
