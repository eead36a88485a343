"""The causal convolution: every backend against torch's own convolution in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import modeling_fambav.causal_conv1d as conv_module
from modeling_fambav import set_selective_scan_backend
from modeling_fambav.causal_conv1d import causal_conv1d
from support.helpers import (
    assert_results_close,
    assert_same_bits,
    conv_inputs,
    in_float64,
    non_contiguous,
    scan_with_gradients,
    tolerance,
)


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's own convolution; the backward direction is turned round before and after."""
    outputs = []
    for direction in range(weight.shape[0]):
        sequence = x.flip(1) if direction == 1 else x
        padded = F.pad(sequence.mT, (weight.shape[-1] - 1, 0))
        output = F.silu(F.conv1d(padded, weight[direction].unsqueeze(1), bias[direction], groups=x.shape[-1])).mT
        outputs.append(output.flip(1) if direction == 1 else output)
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 4])
@pytest.mark.parametrize(
    "shape", [(1, 2, 13, 33), (2, 3, 65, 192), (2, 1, 2, 16), (2, 2, 1, 17), (2, 2, 9, 65), (1, 2, 5, 240)], ids=str
)
def test_convolution_equals_torchs_own(backend, shape, kernel_size, dtype):
    inputs = conv_inputs(*shape, kernel_size, dtype)
    results = scan_with_gradients(causal_conv1d, inputs)
    assert results["out"].dtype == results["dx"].dtype == dtype
    assert results["dweight"].dtype == results["dbias"].dtype == torch.float32
    expected = scan_with_gradients(conv_reference, in_float64(inputs))
    assert_results_close(results, expected, **tolerance("conv", dtype))


def test_numba_rounds_the_convolution_to_bfloat16_once():
    set_selective_scan_backend("numba")
    inputs = conv_inputs(2, 3, 37, 65, 4, torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    expected = scan_with_gradients(lambda **wide: causal_conv1d(**wide).bfloat16(), wide)
    assert_results_close(scan_with_gradients(causal_conv1d, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["transposed", "every second", "part of wider rows"])
def test_convolution_of_non_contiguous_inputs(backend, kind):
    inputs = conv_inputs(2, 2, 13, 32, 4, torch.float32)
    views = {name: non_contiguous(tensor, kind) for name, tensor in inputs.items()}
    assert not views["x"].is_contiguous()
    assert_results_close(
        scan_with_gradients(causal_conv1d, views), scan_with_gradients(causal_conv1d, inputs), rtol=1e-6, atol=1e-6
    )


def test_gradcheck_of_the_torch_convolution():
    set_selective_scan_backend("torch")
    leaves = [tensor.double().requires_grad_() for tensor in conv_inputs(2, 2, 5, 2, 3, torch.float64).values()]
    assert torch.autograd.gradcheck(causal_conv1d, leaves)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_numba_results_do_not_depend_on_threads_or_runs(num_threads):
    set_selective_scan_backend("numba")
    inputs = conv_inputs(2, 3, 70, 150, 4, torch.float32)
    torch.set_num_threads(1)
    expected = scan_with_gradients(causal_conv1d, inputs)
    torch.set_num_threads(num_threads)
    for _ in range(3):
        assert_same_bits(scan_with_gradients(causal_conv1d, inputs), expected)


def test_an_empty_batch(backend):
    assert causal_conv1d(**conv_inputs(2, 0, 9, 32, 4, torch.float32)).shape == (2, 0, 9, 32)


@pytest.mark.parametrize(
    "name, shape",
    [("x", (2, 2, 5, 16)), ("weight", (2, 32, 4)), ("weight", (3, 16, 4)), ("bias", (2, 32)), ("bias", (3, 16))],
)
def test_wrong_shapes_of_the_convolution(backend, name, shape):
    inputs = conv_inputs(2, 2, 5, 16, 4, torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"^{name} of shape"):
        causal_conv1d(**inputs)


def test_opcheck_of_the_convolution():
    leaves = [tensor.requires_grad_() for tensor in conv_inputs(2, 2, 5, 20, 4, torch.float32).values()]
    torch.library.opcheck(conv_module._conv, (*leaves, "numba"))
