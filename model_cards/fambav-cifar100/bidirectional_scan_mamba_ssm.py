"""The mixer between its projections on the packages mamba-ssm and causal-conv1d, with their own gradients.

Their kernels run over `(B, channels, T)` from the first token to the last. The backward direction is turned round once
at the start and once at the end; between the two, all tensors lie in the order of their scans.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    # The package, not our file of the same name
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .selective_scan_mamba_ssm import scan_in_order

# That causal-conv1d has kernels for
_TAPS = (2, 3, 4)


def bidirectional_scan(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_scale: Tensor | None,
) -> Tensor:
    """As `bidirectional_scan.bidirectional_scan`.

    Raises:
        ValueError: if the convolution has more or fewer taps than the package knows.
    """
    if conv_weight.shape[-1] not in _TAPS:
        raise ValueError(
            f"conv_kernel {conv_weight.shape[-1]}: the backend 'mamba-ssm' expects one of {_TAPS}; 'triton' takes any"
        )
    num_directions, channels, state_size = A.shape
    x, z = xz.chunk(2, dim=-1)
    x = _in_scan_order(x.mT, num_directions)  # (B, G, E, T)
    x = causal_conv1d_fn(x.flatten(1, 2), conv_weight.flatten(0, 1), conv_bias.flatten(), activation="silu")
    x = x.unflatten(1, (num_directions, channels))
    chosen = x_proj @ x
    low_rank_dt, B, C = chosen.split([chosen.shape[2] - 2 * state_size, state_size, state_size], dim=2)
    dt = dt_proj @ low_rank_dt
    if dt_scale is None:
        y = scan_in_order(x, dt, A, B, C, D, dt_bias, has_delta=False)
    else:
        scale = _in_scan_order(dt_scale.detach().unsqueeze(1), num_directions)  # (B, G, 1, T)
        delta = F.softplus(dt.float() + dt_bias[:, :, None]) * scale
        y = scan_in_order(x, delta.to(x.dtype), A, B, C, D, None, has_delta=True)
    y = y.float()
    y = y[:, 0] if num_directions == 1 else (y[:, 0] + y[:, 1].flip(-1)) / 2
    return (y.mT * F.silu(z.float())).to(xz.dtype)


def _in_scan_order(tensor: Tensor, num_directions: int) -> Tensor:
    """(B, ..., T) -> (B, G, ..., T): for every direction, from its first token to its last."""
    return torch.stack((tensor, tensor.flip(-1))[:num_directions], dim=1)
