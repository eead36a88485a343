"""Kernels, models and training steps give the same bits whatever torch's default dtype and device are.

Others set them: Lightning's `bf16-true` sets the dtype, `accelerate` and `from_pretrained` the device.
"""

import contextlib

import pytest
import torch
from torch import Tensor

from modeling_fambav import FambaVForImageClassification, backends, match_tokens, set_selective_scan_backend
from modeling_fambav.causal_conv1d import causal_conv1d
from modeling_fambav.rms_norm import rms_norm
from modeling_fambav.selective_scan import selective_scan
from support.helpers import gradient_of, random_tensor, scan_inputs, scan_with_gradients, tiny_config


@pytest.fixture(autouse=True)
def restored_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "cpu": lambda: torch.device("cpu"),
}


@pytest.fixture(params=SURROUNDINGS)
def surroundings(request):
    """A context manager, entered by the test where it computes."""
    return SURROUNDINGS[request.param]()


def with_gradients(function, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    out.backward(gradient_of(out.detach()))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def scan(dtype: torch.dtype, num_tokens: int = 70) -> list[Tensor]:
    return list(scan_with_gradients(selective_scan, scan_inputs(2, 2, num_tokens, 33, 4, dtype=dtype)).values())


def convolution(dtype: torch.dtype) -> list[Tensor]:
    parameters = random_tensor(2, 33, 4, seed=2), random_tensor(2, 33, seed=3)
    return with_gradients(causal_conv1d, random_tensor(2, 9, 33, seed=1, dtype=dtype), *parameters)


def norm(dtype: torch.dtype) -> list[Tensor]:
    tensors = random_tensor(2, 70, 32, seed=1, dtype=dtype), random_tensor(32, seed=2, dtype=dtype)
    return with_gradients(lambda x, weight: rms_norm(x, weight, 1e-5), *tensors)


def fusion(dtype: torch.dtype) -> list[Tensor]:
    values, sizes = random_tensor(2, 17, 35, seed=1, dtype=dtype), 1 + random_tensor(2, 17, seed=2).abs()
    results = []
    for similarity in ("cosine", "dot", "euclidean"):
        for order, class_index in (("raster", 8), ("appended", torch.zeros(2, 1, dtype=torch.int64, device="cpu"))):
            matching = match_tokens(values, 5, class_index, similarity, order)
            for weights in (None, sizes):
                results += [matching.new_index, *with_gradients(lambda v: matching.merge(v, weights), values)]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", [scan, convolution, norm, fusion])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_operators(surroundings, backend, operation, dtype):
    set_selective_scan_backend(backend)
    expected = operation(dtype)
    with surroundings:
        results = operation(dtype)
    assert len(results) == len(expected) >= 3
    for tensor, expected_tensor in zip(results, expected):
        assert expected_tensor.isfinite().all()
        assert tensor.dtype == expected_tensor.dtype and torch.equal(tensor, expected_tensor)


@pytest.mark.parametrize("operation", [lambda dtype: scan(dtype, num_tokens=3), convolution], ids=["scan", "conv"])
def test_interpreted_gpu_kernels(surroundings, operation):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("triton compiles its kernels where there is a GPU")
    set_selective_scan_backend("triton")
    expected = operation(torch.float32)
    with surroundings:
        results = operation(torch.float32)
    for tensor, expected_tensor in zip(results, expected):
        assert tensor.dtype == expected_tensor.dtype and torch.equal(tensor, expected_tensor)


def trained_step(model: FambaVForImageClassification) -> list[Tensor]:
    """Logits, loss and all weights after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.tensor([0, 1], device="cpu")
    output = model(random_tensor(2, 3, 16, 16, seed=0), labels=labels)
    output.loss.backward()
    optimizer.step()
    return [output.logits.detach(), output.loss.detach(), *model.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fields", [{}, {"fusion_reduction": "size_weighted"}], ids=["mean", "size_weighted"])
def test_training_step_of_a_model(surroundings, fields, dtype):
    def new_model() -> FambaVForImageClassification:
        torch.manual_seed(0)
        return FambaVForImageClassification(tiny_config(**fields)).to(dtype)

    expected = trained_step(new_model())
    model = new_model()
    with surroundings:
        results = trained_step(model)
    assert len(results) == len(expected) > 3
    for tensor, expected_tensor in zip(results, expected):
        assert expected_tensor.isfinite().all()
        assert tensor.dtype == expected_tensor.dtype and torch.equal(tensor, expected_tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_that_is_made_in_another_default_dtype(dtype):
    with default_dtype(dtype):
        torch.manual_seed(0)
        model = FambaVForImageClassification(tiny_config()).eval()
        logits = model(random_tensor(2, 3, 16, 16, seed=0)).logits
    assert model.classifier.weight.dtype == logits.dtype == dtype and logits.isfinite().all()
    assert torch.equal(model(random_tensor(2, 3, 16, 16, seed=0)).logits, logits)


def test_a_model_that_is_made_on_the_meta_device_has_no_memory_and_shapes_flow():
    with torch.device("meta"):
        model = FambaVForImageClassification(tiny_config())
        logits = model(torch.empty(2, 3, 16, 16)).logits
    assert logits.device.type == "meta" and logits.shape == (2, model.config.num_labels)
