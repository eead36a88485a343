"""The GPU kernels against the float64 reference: interpreted on a CPU, compiled where there is a GPU (`-m gpu`)."""

import math

import pytest
import torch

from modeling_fambav import backends, set_selective_scan_backend
from modeling_fambav.causal_conv1d import causal_conv1d
from modeling_fambav.selective_scan import scan_kernels, selective_scan, selective_scan_reference
from support.helpers import conv_inputs, gradient_of, random_tensor, scan_inputs, scan_with_gradients, tolerance

pytest.importorskip("triton")

from modeling_fambav import causal_conv1d_triton
from modeling_fambav.causal_conv1d_triton import CHUNK

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (directions, batch, tokens, channels, state), around blocks of 16 to 64 channels and chunks of 32 tokens
SMALL = [(1, 1, 1, 16, 1), (2, 2, 2, 33, 3), (2, 1, 33, 40, 4), (1, 1, 64, 8, 2), (2, 1, 3, 70, 16), (1, 2, 5, 20, 40)]
LARGE = [(2, 3, 197, 384, 16), (2, 1, 1024, 192, 16), (1, 8, 65, 33, 4), (2, 2, 13, 768, 1)]
CASES = [("cpu", shape) for shape in SMALL] + [
    pytest.param("cuda", shape, marks=pytest.mark.gpu) for shape in SMALL + LARGE
]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)
    set_selective_scan_backend("triton")


def reference_results(inputs):
    inputs = {name: tensor if tensor is None else tensor.double() for name, tensor in inputs.items()}
    return scan_with_gradients(lambda **leaves: selective_scan_reference(**leaves)[0], inputs)


def on(device, inputs):
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device, shape", CASES, ids=str)
def test_scan_equals_the_reference(device, shape, dtype):
    inputs = on(device, scan_inputs(*shape, dtype=dtype))
    results, expected = scan_with_gradients(selective_scan, inputs), reference_results(inputs)
    assert results.keys() == expected.keys()
    for name, tensor in results.items():
        torch.testing.assert_close(
            tensor, expected[name].to(tensor.dtype), **tolerance("scan", dtype), msg=lambda msg: f"{name}: {msg}"
        )


@pytest.mark.parametrize("absent", [("z",), ("dt_bias",), ("dt_scale",), ("z", "dt_bias", "dt_scale")], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_scan_without_optional_arguments(device, absent):
    inputs = on(device, scan_inputs(2, 1, 5, 20, 3) | dict.fromkeys(absent))
    results, expected = scan_with_gradients(selective_scan, inputs), reference_results(inputs)
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_time_steps_are_exact_where_they_are_small(device):
    """One token: the output is C B x softplus(dt), whose relative error must be float32's from -80 to 30.

    A GPU rounds the argument of its exp2, so the error there grows with the distance from 0.
    """
    dt = torch.linspace(-80, 30, 441, device=device).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=device)
    inputs = {"x": torch.ones_like(dt), "dt": dt, "A": -torch.ones(1, 441, 1, device=device), "B": one, "C": one}
    inputs["D"] = torch.zeros(1, 441, device=device)
    results, expected = scan_with_gradients(selective_scan, inputs), reference_results(inputs)
    bound = 2e-6 + (2**-23 * dt.abs().double() if device == "cuda" else 0.0)
    for name in ("out", "ddt"):
        error = (results[name].double() - expected[name]).abs() / expected[name].abs()
        assert (error.view(dt.shape) <= bound).all()


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "dt_bias"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_stays_none(device, name):
    """A NaN passes to all that depends on it, and to nothing else."""
    inputs = scan_inputs(2, 2, 6, 20, 3)
    inputs[name].flatten(0, -2)[1, 2] = math.nan
    inputs = on(device, inputs)
    results, expected = scan_with_gradients(selective_scan, inputs), reference_results(inputs)
    for result, tensor in results.items():
        assert torch.equal(tensor.isnan(), expected[result].isnan()), result
        torch.testing.assert_close(tensor, expected[result].float(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_results_per_token_are_in_the_dtype_of_the_inputs(device):
    inputs = list(on(device, scan_inputs(2, 1, 5, 20, 3, dtype=torch.bfloat16)).values())
    out, states = scan_kernels("triton").forward(*inputs, True)
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias = scan_kernels("triton").backward(torch.ones_like(out), *inputs, states)
    assert {tensor.dtype for tensor in (out, dx, ddt, dz)} == {torch.bfloat16}
    # Sums over many tokens or channels
    assert {tensor.dtype for tensor in (states, dA, dB, dC, dD, ddt_bias)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 4])
@pytest.mark.parametrize("num_directions, num_tokens", [(1, 1), (2, 2), (2, 21)])
@pytest.mark.parametrize("device", DEVICES)
def test_convolution_equals_the_torch_backend(device, num_directions, num_tokens, kernel_size, dtype):
    assert_convolution_is_right(device, num_directions, num_tokens, kernel_size, dtype)


# One chunk or two and more, with borders that passes of four positions and windows of four tokens meet or miss
@pytest.mark.parametrize("num_directions, num_tokens", [(2, CHUNK + more) for more in (-3, -1, 0, 1, 3)] + [(1, 99)])
@pytest.mark.parametrize("device", DEVICES)
def test_convolution_around_the_borders_of_chunks(device, num_directions, num_tokens):
    assert_convolution_is_right(device, num_directions, num_tokens, 4, torch.float32)


# With chunks of eight positions every distance between the end of a chunk and that of the sequence occurs
@pytest.mark.parametrize("num_tokens", range(5, 21))
@pytest.mark.parametrize("kernel_size", [2, 4, 7])
def test_convolution_in_short_chunks(monkeypatch, num_tokens, kernel_size):
    monkeypatch.setattr(causal_conv1d_triton, "CHUNK", 8)
    assert_convolution_is_right("cpu", 2, num_tokens, kernel_size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_of_the_gradients_of_the_convolution(device, dtype):
    inputs = on(device, conv_inputs(2, 2, 9, 20, 4, dtype))
    out = causal_conv1d_triton.conv_forward(**inputs)
    dx, dweight, dbias = causal_conv1d_triton.conv_backward(out, **inputs)
    assert dx.dtype == out.dtype == dtype and dweight.dtype == dbias.dtype == torch.float32


def assert_convolution_is_right(device, num_directions, num_tokens, kernel_size, dtype):
    """Values and gradients against plain torch in float64."""
    # A slice, as the mixer passes it: rows are further apart than they are long
    x = random_tensor(2, num_tokens, 60, seed=1, dtype=dtype).to(device)[..., :33]
    weight = random_tensor(num_directions, 33, kernel_size, seed=2).to(device)
    bias = random_tensor(num_directions, 33, seed=3).to(device)

    def with_gradients(backend, *tensors):
        set_selective_scan_backend(backend)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = causal_conv1d(*leaves)
        out.backward(gradient_of(out))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    results = with_gradients("triton", x, weight, bias)
    expected = with_gradients("torch", x.double(), weight.double(), bias.double())
    for tensor, expected_tensor in zip(results, expected):
        torch.testing.assert_close(tensor, expected_tensor.to(tensor.dtype), **tolerance("conv", dtype))


def test_an_image_that_32_bits_cannot_count_is_refused():
    x, one = torch.empty(1, 1, 2**20, 2048, device="meta"), torch.empty(1, 1, 2**20, 1, device="meta")
    A, D = torch.empty(1, 2048, 1, device="meta"), torch.empty(1, 2048, device="meta")
    with pytest.raises(ValueError, match=r"1048576 tokens, 2048 elements apart: expected less than 2\*\*31"):
        scan_kernels("triton").forward(x, x, A, one, one, D, None, None, None, False)
