"""The mixer's operator: values and every gradient against separate operators in float64, and what it keeps."""

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor

from modeling_fambav import backends, set_selective_scan_backend
from modeling_fambav.bidirectional_scan import (
    _product_over_tokens,
    _scan,
    bidirectional_scan,
    bidirectional_scan_in_parts,
)
from support.helpers import gradient_of, random_tensor, scan_inputs, tolerance
from support.mamba_packages import stand_in_for_mamba_ssm

# The function of the same name hides it
mixer_module = importlib.import_module("modeling_fambav.bidirectional_scan")

GPU = pytest.mark.gpu
# (batch, tokens, channels, state, rank, taps)
SMALL = [(1, 1, 16, 1, 1, 1), (2, 2, 33, 3, 2, 4), (1, 33, 40, 4, 3, 3)]
LARGE = [(3, 13, 192, 16, 6, 4), (2, 197, 64, 16, 12, 4), (2, 65, 240, 4, 8, 4), (1, 1024, 33, 4, 1, 2)]
CASES = [
    *(("numba", "cpu", shape) for shape in SMALL + LARGE),
    *(("triton", "cpu", shape) for shape in SMALL),
    *(pytest.param("triton", "cuda", shape, marks=GPU) for shape in SMALL + LARGE),
]


@pytest.fixture(autouse=True)
def restored_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)


def mixer_inputs(batch_size, num_tokens, channels, state_size, rank, taps, dtype=torch.float32) -> dict[str, Tensor]:
    """Arguments of `bidirectional_scan`, about as large as in a model; parameters in float32 or wider."""
    scan = scan_inputs(2, batch_size, num_tokens, channels, state_size, dtype)
    parameter_dtype = scan["A"].dtype

    def parameter(*shape: int, seed: int, scale: float) -> Tensor:
        return scale * random_tensor(*shape, seed=seed, dtype=parameter_dtype)

    return {
        "xz": random_tensor(batch_size, num_tokens, 2 * channels, seed=10, dtype=dtype),
        "conv_weight": parameter(2, channels, taps, seed=11, scale=0.5),
        "conv_bias": parameter(2, channels, seed=12, scale=0.1),
        "x_proj": parameter(2, rank + 2 * state_size, channels, seed=13, scale=channels**-0.5),
        "dt_proj": parameter(2, channels, rank, seed=14, scale=rank**-0.5),
        "dt_bias": scan["dt_bias"],
        "A": scan["A"],
        "D": scan["D"],
        "dt_scale": scan["dt_scale"],
    }


def results_of(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_(name != "dt_scale") for name, tensor in inputs.items()}
    out = function(**leaves)
    out.backward(gradient_of(out))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Results for inputs of a dtype against those in float64."""
    for name, tensor in results.items():
        assert tensor.dtype == (dtype if name in ("out", "xz") else torch.float32)
        scale = expected[name].abs().max().clamp(min=1)  # gradients of parameters are sums over all tokens
        torch.testing.assert_close(
            tensor.double() / scale,
            expected[name] / scale,
            **tolerance("scan", dtype),
            msg=lambda msg, name=name: f"{name}: {msg}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend, device, shape", CASES, ids=str)
def test_equals_separate_operators_in_float64(backend, device, shape, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = {name: tensor.to(device) for name, tensor in mixer_inputs(*shape, dtype=dtype).items()}
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    expected = results_of(partial(bidirectional_scan_in_parts, "torch"), wide)
    set_selective_scan_backend(backend)
    results = results_of(bidirectional_scan, inputs)
    assert results.keys() == expected.keys() == (inputs.keys() | {"out"}) - {"dt_scale"}
    assert_close(results, expected, dtype)


def test_other_dtypes_than_those_of_the_kernels():
    """What the CPU kernels compute in float32 is put into the gradient's own dtype, also without padded channels."""
    set_selective_scan_backend("numba")
    inputs = mixer_inputs(2, 33, 80, 4, 3, 4)
    expected = results_of(bidirectional_scan, inputs)
    for dtype, rtol in ((torch.float16, 5e-3), (torch.float64, 1e-4)):
        results = results_of(bidirectional_scan, {**inputs, "xz": inputs["xz"].to(dtype)})
        assert results["out"].dtype == results["xz"].dtype == dtype
        for name, tensor in results.items():
            scale = expected[name].abs().max()
            torch.testing.assert_close(tensor.double() / scale, expected[name].double() / scale, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("num_parts", [1, 4, 64])
def test_weights_gradients_are_added_up_in_parts(num_parts):
    """As on a GPU; the left one is a slice, as it is in the mixer."""
    chosen, other = (
        random_tensor(2, 64 * 5, 9, seed=0, dtype=torch.float64),
        random_tensor(2, 64 * 5, 7, seed=1).double(),
    )
    for left in (chosen, chosen[..., :4]):
        result = _product_over_tokens(left, other, num_parts)
        torch.testing.assert_close(result, torch.einsum("gtm,gtn->gmn", left, other))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_backend_is_chosen_once(monkeypatch, backend):
    choices = []

    def choose(tensor: Tensor) -> str:
        choices.append(backend)
        return backend

    for name in ("bidirectional_scan", "causal_conv1d", "selective_scan"):
        monkeypatch.setattr(importlib.import_module(f"modeling_fambav.{name}"), "selective_scan_backend", choose)
    bidirectional_scan(**mixer_inputs(1, 5, 16, 2, 1, 3))
    assert choices == [backend]


def test_without_a_gradient_the_values_are_the_same():
    inputs = mixer_inputs(2, 13, 33, 4, 2, 4)
    expected = results_of(bidirectional_scan, inputs)["out"]
    with torch.no_grad():
        assert torch.equal(bidirectional_scan(**inputs), expected)


def test_a_frozen_input_gets_no_gradient():
    inputs = mixer_inputs(1, 5, 16, 2, 1, 3)
    expected = results_of(bidirectional_scan, inputs)
    inputs["x_proj"].requires_grad_()
    out = bidirectional_scan(**inputs)
    out.backward(gradient_of(out))
    assert torch.equal(inputs["x_proj"].grad, expected["x_proj"])
    assert all(tensor.grad is None for name, tensor in inputs.items() if name != "x_proj")


def test_keeps_less_than_separate_operators_for_the_backward_pass():
    inputs = mixer_inputs(2, 197, 384, 16, 12, 4)

    def kept_bytes(function) -> int:
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = {name: tensor.detach().requires_grad_(name != "dt_scale") for name, tensor in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(**leaves)  # its graph holds what is kept
        assert out.requires_grad
        return sum(kept.values())

    assert kept_bytes(bidirectional_scan) < 0.5 * kept_bytes(partial(bidirectional_scan_in_parts, "numba"))


@pytest.mark.parametrize("shape", [(2, 5, 20, 3, 2, 4), (1, 80, 80, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, has_scale, shape):
    inputs = mixer_inputs(*shape, dtype=dtype)
    inputs["x_proj"], inputs["dt_proj"] = inputs["x_proj"].to(dtype), inputs["dt_proj"].to(dtype)
    leaves = [tensor.requires_grad_(name != "dt_scale") for name, tensor in inputs.items()]
    if not has_scale:
        leaves[-1] = None
    torch.library.opcheck(_scan, (*leaves, True, "numba"))


def test_compiled_equals_eager():
    inputs = mixer_inputs(2, 13, 32, 4, 2, 4)
    torch.compiler.reset()
    compiled = torch.compile(bidirectional_scan, fullgraph=True, backend="aot_eager")
    results, expected = results_of(compiled, inputs), results_of(bidirectional_scan, inputs)
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_autocast_computes_matrix_products_in_its_dtype():
    # The output of in_proj is already in bfloat16 there; the parameters are not.
    inputs = mixer_inputs(2, 13, 32, 4, 2, 4, dtype=torch.bfloat16)
    expected = results_of(bidirectional_scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        results = results_of(bidirectional_scan, inputs)
    for name, tensor in results.items():
        assert torch.equal(tensor, expected[name])


# ---- mamba-ssm and causal-conv1d, on the CPU by stand-ins for their kernels ----


@pytest.fixture
def mamba_ssm(monkeypatch):
    stand_in_for_mamba_ssm(monkeypatch)
    mixer_module._mamba_ssm_scan.cache_clear()
    monkeypatch.setattr(mixer_module, "selective_scan_backend", lambda tensor: "mamba-ssm")
    yield
    mixer_module._mamba_ssm_scan.cache_clear()


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 33, 3, 2, 4), (1, 33, 40, 4, 3, 3), (3, 13, 192, 16, 6, 4)], ids=str)
def test_mamba_ssm_and_causal_conv1d(mamba_ssm, shape, dtype, has_scale):
    inputs = mixer_inputs(*shape, dtype=dtype)
    if not has_scale:
        del inputs["dt_scale"]
    results = results_of(bidirectional_scan, inputs)
    in_parts = partial(bidirectional_scan_in_parts, "torch")
    expected = results_of(in_parts, {name: tensor.double() for name, tensor in inputs.items()})
    assert results.keys() == expected.keys() and results["out"].dtype == dtype
    assert_close(results, expected, dtype)


def test_one_direction_on_mamba_ssm(mamba_ssm):
    inputs = {
        name: tensor if name in ("xz", "dt_scale") else tensor[:1]
        for name, tensor in mixer_inputs(2, 5, 16, 4, 2, 4).items()
    }
    expected = bidirectional_scan_in_parts("torch", **inputs)
    torch.testing.assert_close(bidirectional_scan(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_turned_round_twice(mamba_ssm):
    inputs = mixer_inputs(2, 5, 16, 4, 2, 4)
    del inputs["dt_scale"]
    with torch.profiler.profile() as profile:
        bidirectional_scan(**inputs)
    (flips,) = (event.count for event in profile.key_averages() if event.key == "aten::flip")
    assert flips == 2  # the input, and the output of the backward direction


def test_taps_that_causal_conv1d_does_not_know(mamba_ssm):
    with pytest.raises(ValueError, match=r"conv_kernel 1: the backend 'mamba-ssm' expects one of \(2, 3, 4\)"):
        bidirectional_scan(**mixer_inputs(1, 3, 16, 2, 1, 1))
