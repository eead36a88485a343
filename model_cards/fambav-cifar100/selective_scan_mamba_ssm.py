"""The selective scan on mamba-ssm's compiled CUDA kernel. Names are those of `selective_scan.py`."""

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
    """As `selective_scan`, with mamba-ssm's own gradients.

    Its kernel knows one direction and wants `(B, channels, T)`. Both directions are stacked on the channels, the
    backward one flipped, and B and C form one group per direction, so that one launch scans them all.
    """
    softplus_in_kernel = dt_scale is None
    if not softplus_in_kernel:
        dt, dt_bias = time_steps(dt, dt_bias, dt_scale), None

    def to_kernel(tensor: Tensor) -> Tensor:
        return in_scan_order(tensor).permute(1, 0, 3, 2).to(x.dtype).contiguous()  # (B, G, channels, T)

    y = selective_scan_fn(
        to_kernel(x).flatten(1, 2),
        to_kernel(dt).flatten(1, 2),
        A.float().flatten(0, 1),
        to_kernel(B),
        to_kernel(C),
        D.float().flatten(),
        delta_bias=None if dt_bias is None else dt_bias.float().flatten(),
        delta_softplus=softplus_in_kernel,
    )
    y = y.unflatten(1, (x.shape[0], -1)).permute(1, 0, 3, 2)  # (G, B, T, E)
    return gated_mean(in_scan_order(y).float(), z).to(x.dtype)
