"""The selective scan on mamba-ssm's compiled CUDA kernel. Names are those of `selective_scan.py`.

The kernel knows one direction, wants `(B, channels, T)` and keeps all that its own gradients need. Both directions are
stacked on the channels, in the order of their scans, and B and C form one group per direction, so that one launch
scans them all.
"""

from torch import Tensor

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .selective_scan_torch import gated_mean, in_scan_order, time_steps


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_scale: Tensor | None,
) -> Tensor:
    """As `selective_scan`."""
    has_delta = dt_scale is not None
    if has_delta:
        dt, dt_bias = time_steps(dt, dt_bias, dt_scale), None

    def to_kernel(tensor: Tensor) -> Tensor:
        return in_scan_order(tensor).permute(1, 0, 3, 2).to(x.dtype)

    y = scan_in_order(to_kernel(x), to_kernel(dt), A, to_kernel(B), to_kernel(C), D, dt_bias, has_delta)
    return gated_mean(in_scan_order(y.permute(1, 0, 3, 2)).float(), z).to(x.dtype)


def scan_in_order(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, has_delta: bool
) -> Tensor:
    """The scan of tensors that lie as the kernel wants them, every direction from its first token to its last.

    Args:
        x, dt (`Tensor` of shape `(B, G, E, T)`): inputs; time steps before bias and softplus, or delta.
        B, C (`Tensor` of shape `(B, G, N, T)`).
        A, D, dt_bias: as `selective_scan`.
        has_delta (`bool`): whether `dt` is delta.

    Returns:
        `Tensor` of shape `(B, G, E, T)`: the outputs of the directions, not gated.
    """
    y = selective_scan_fn(
        x.contiguous().flatten(1, 2),
        dt.contiguous().flatten(1, 2),
        A.float().flatten(0, 1),
        B.contiguous(),
        C.contiguous(),
        D.float().flatten(),
        delta_bias=None if dt_bias is None else dt_bias.float().flatten(),
        delta_softplus=not has_delta,
    )
    return y.unflatten(1, x.shape[1:3])
