"""Stand-ins for the packages mamba-ssm and causal-conv1d, which need a GPU: their functions as they are documented."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F


def documented_selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """What mamba-ssm documents. u, delta (batch, channels, length); A (channels, N); B, C (batch, groups, N, length).

    Its CUDA kernel wants float32 parameters, B and C in the dtype of u, and a last stride of 1.
    """
    assert all(tensor.dtype == torch.float32 for tensor in (A, D, delta_bias) if tensor is not None)
    assert all(tensor.dtype == u.dtype and tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    assert z is None  # it knows no gate that both directions share
    dtype, channels, length = u.dtype, u.shape[1], u.shape[2]
    u, delta, B, C = u.float(), delta.float(), B.float(), C.float()
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (tensor.repeat_interleave(channels // tensor.shape[1], dim=1) for tensor in (B, C))
    state, y = u.new_zeros(u.shape[0], channels, A.shape[1]), []
    for t in range(length):
        drive = (delta[:, :, t] * u[:, :, t]).unsqueeze(-1) * B[..., t]
        state = torch.exp(delta[:, :, t, None] * A) * state + drive
        y.append((state * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(y, dim=2).to(dtype)


def documented_causal_conv1d_fn(x, weight, bias=None, activation=None):
    """What causal-conv1d documents: x (batch, channels, length), weight (channels, taps), bias (channels)."""
    assert activation == "silu" and 1 in (x.stride(1), x.stride(2))
    channels, taps = weight.shape
    out = F.conv1d(x.float(), weight.unsqueeze(1).float(), bias.float(), padding=taps - 1, groups=channels)
    return F.silu(out[..., : x.shape[2]]).to(x.dtype)


def stand_in_for_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both packages be found, and our modules import them anew."""
    interface, conv = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    interface.selective_scan_fn, conv.causal_conv1d_fn = documented_selective_scan_fn, documented_causal_conv1d_fn
    packages = [ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops"), interface, conv]
    for module in packages:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("selective_scan_mamba_ssm", "bidirectional_scan_mamba_ssm"):
        monkeypatch.delitem(sys.modules, f"modeling_fambav.{name}", raising=False)
