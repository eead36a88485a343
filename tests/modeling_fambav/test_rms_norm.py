"""The norm's CPU kernel against torch's own norm."""

import pytest
import torch
import torch.nn.functional as F

from modeling_fambav import backends, set_selective_scan_backend
from modeling_fambav.rms_norm import _rms_norm, rms_norm
from support.helpers import gradient_of, random_tensor


@pytest.fixture(autouse=True)
def numba_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)
    set_selective_scan_backend("numba")


def with_gradients(function, x, weight):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight)
    out.backward(gradient_of(out))
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 65, 192), (2, 7, 33), (0, 5, 32), (130, 48)], ids=str)
def test_kernel_equals_torch(shape):
    x, weight = 3 * random_tensor(*shape, seed=1), random_tensor(shape[-1], seed=2)
    results = with_gradients(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight)
    expected = with_gradients(lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5), x.double(), weight.double())
    for actual, expected_tensor in zip(results, expected):
        torch.testing.assert_close(actual, expected_tensor.float(), rtol=1e-5, atol=1e-5)


def test_zeros_and_slices():
    x = random_tensor(2, 5, 64, seed=1)[..., :32]
    x[0] = 0
    weight = random_tensor(32, seed=2)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (32,), weight, 1e-5))


def test_a_wider_stream_gives_the_dtype_of_the_weights():
    x, weight = random_tensor(2, 5, 32, seed=1), random_tensor(32, seed=2, dtype=torch.bfloat16)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.rms_norm(x, (32,), weight.float(), 1e-5).to(torch.bfloat16))


def test_opcheck():
    inputs = (random_tensor(2, 5, 32, seed=1).requires_grad_(), random_tensor(32, seed=2).requires_grad_(), 1e-5)
    torch.library.opcheck(_rms_norm, inputs)
