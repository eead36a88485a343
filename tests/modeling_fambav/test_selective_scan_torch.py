"""The plain torch scan as devices without kernels run it: in blocks, with few calls. A CPU is made to do so here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_fambav.selective_scan_torch as torch_backend
from modeling_fambav.bidirectional_scan import bidirectional_scan_in_parts
from modeling_fambav.selective_scan import selective_scan_reference
from support.helpers import scan_inputs, scan_with_gradients, tolerance


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(torch_backend, "_in_blocks", lambda tensor: True)


def reference(**inputs):
    return selective_scan_reference(**inputs)[0]


# (directions, batch, tokens, channels, state): around blocks of 4 and chunks of 52 steps
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 52, 53, 55, 197])
def test_blocks_equal_the_reference(in_blocks, num_tokens):
    inputs = scan_inputs(2, 2, num_tokens, 5, 3, dtype=torch.float64)
    results = scan_with_gradients(torch_backend.scan, inputs)
    expected = scan_with_gradients(reference, inputs)
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=lambda msg: f"{name}: {msg}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_vim_ti(in_blocks, dtype):
    inputs = scan_inputs(2, 1, 197, 384, 16, dtype=dtype)
    results = scan_with_gradients(torch_backend.scan, inputs)
    expected = scan_with_gradients(
        reference, {name: tensor if tensor is None else tensor.double() for name, tensor in inputs.items()}
    )
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), **tolerance("scan", dtype))


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "z"])
def test_a_nan_spreads_through_blocks_as_in_the_reference(in_blocks, name):
    inputs = scan_inputs(2, 2, 60, 8, 4)
    inputs[name].view(-1)[5] = float("nan")
    is_nan = torch_backend.scan(**inputs).isnan()
    assert is_nan.any() and torch.equal(is_nan, reference(**inputs).isnan())


def test_chunks_on_a_cpu_stay_in_the_cache():
    lengths = []
    for batch_size in (1, 8, 1000):
        x, A = torch.empty(2, batch_size, 197, 384, device="meta"), torch.empty(2, 384, 16, device="meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_backend, "_in_blocks", lambda tensor: False)
            chunks = list(torch_backend._chunks(x, A))
        assert sum(count for _, count in chunks) == 197 and chunks[-1][0].stop == 197
        lengths.append(chunks[0][1])
    assert lengths == [42, 5, 1]  # of 2 MiB, or a step


class _Calls(TorchDispatchMode):
    """Counts all calls of operators but those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        first = out[0] if isinstance(out, (list, tuple)) else out
        storages = {tensor.untyped_storage()._cdata for tensor in arguments if isinstance(tensor, torch.Tensor)}
        is_view = isinstance(first, torch.Tensor) and first.untyped_storage()._cdata in storages
        self.count += not is_view or function._schema.is_mutable
        return out


def test_a_mixer_makes_few_calls(monkeypatch):
    """Vim-Ti at 197 tokens, on a device that is no CPU, from the convolution to the gate, inside operators too."""
    monkeypatch.setattr(torch_backend, "recurrence", torch_backend._recurrence_in_chunks)

    def empty(*shape):
        return torch.empty(shape, device="meta")

    xz, conv_weight, conv_bias = empty(8, 197, 768), empty(2, 384, 4), empty(2, 384)
    x_proj, dt_proj, dt_bias, A, D = (
        empty(2, 44, 384), empty(2, 384, 12), empty(2, 384), empty(2, 384, 16), empty(2, 384)
    )  # fmt: skip
    with torch.no_grad(), _Calls() as calls:
        out = bidirectional_scan_in_parts("torch", xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    assert out.shape == (8, 197, 384)
    # The recurrence takes at least one call per block of four tokens; the rest of a layer has ten
    assert 49 < calls.count <= 140
