"""Kernels start on the device of their tensors, seen with two devices that are not there."""

import pytest
import torch

from support.helpers import scan_inputs

pytest.importorskip("triton")

from modeling_fambav import causal_conv1d_triton, selective_scan_triton, token_fusion_triton


@pytest.fixture
def launches(monkeypatch):
    """By kernel, the device that was current when it was launched."""
    current, seen = [0], {}

    def exchange(device: int) -> int:
        previous, current[0] = current[0], device if device >= 0 else current[0]
        return previous

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.update({self.name: current[0]})

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    for module in (causal_conv1d_triton, selective_scan_triton, token_fusion_triton):
        for name in ("_conv_forward", "_conv_backward", "_scan_forward", "_scan_backward", "_match", "_merge"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(token_fusion_triton, "_merge_backward", Kernel("_merge_backward"))
    yield seen
    assert current == [0]  # as before


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_tensors_is_current(launches, index, monkeypatch):
    # Tensors without data say that they are on this device
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: index)
    tokens, weight, bias = (torch.empty(shape, device="meta") for shape in ((2, 9, 16), (2, 16, 4), (2, 16)))
    inputs = [tensor.to("meta") for tensor in scan_inputs(2, 1, 5, 16, 4).values()]
    u = causal_conv1d_triton.conv_forward(tokens, weight, bias)
    causal_conv1d_triton.conv_backward(u, tokens, weight, bias)
    out, states = selective_scan_triton.scan_forward(*inputs, keep_states=True)
    selective_scan_triton.scan_backward(out, *inputs, states)
    new_index = token_fusion_triton.match(tokens, 0, 2, "cosine", "raster", 5)
    merged = token_fusion_triton.merge([tokens], new_index, 7, None)
    token_fusion_triton.merge_backward(merged, new_index, None)
    assert len(launches) == 7 and set(launches.values()) == {index}
